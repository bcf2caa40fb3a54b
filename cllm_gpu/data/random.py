"""Counter-based random numbers for data: the same on every machine and NumPy version, without state to save."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_ROUNDS = 5


def mix(words: Words) -> Words:
    """A bijection of 64-bit words that mixes all bits: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    words = words ^ (words >> np.uint64(30))
    words = words * np.uint64(0xBF58476D1CE4E5B9)
    words = words ^ (words >> np.uint64(27))
    words = words * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def hash_words(*values: int) -> int:
    """A 64-bit hash of a tuple of integers (BLAKE2b of their decimal digits)."""
    digest = hashlib.blake2b(" ".join(map(str, values)).encode("ascii"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def permute(positions: Words, size: int, key: int) -> Words:
    """Apply the permutation of [0, size) given by `key` to `positions`; O(len(positions)) time and memory for any size.

    A bijection of [0, next power of two) is applied until the value is below `size` (cycle walking: Black and Rogaway
    2002); fewer than two applications are expected. Each of its rounds adds a constant, multiplies by an odd one and
    XORs the high half of the bits into the low half: bijections modulo a power of two, with constants drawn by the key.
    """
    bits = max(1, (size - 1).bit_length())
    mask, fold = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    result = positions.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        words = result[outside]
        for added, factor in _round_constants(key):
            words = ((words + added) * factor) & mask
            words ^= words >> fold
        result[outside] = words
        outside = outside[words >= np.uint64(size)]
    return result


@functools.lru_cache(maxsize=64)
def _round_constants(key: int) -> tuple[tuple[np.uint64, np.uint64], ...]:
    return tuple((np.uint64(hash_words(key, n, 0)), np.uint64(hash_words(key, n, 1) | 1)) for n in range(_ROUNDS))
