"""Counter-based randomness for data: the same numbers on every machine and NumPy version, with no state to save."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_ROUNDS = 6  # four make a strong pseudo-random permutation (Luby and Rackoff 1988); two more for small halves


def mix(words: Words) -> Words:
    """A bijection of 64-bit words that scrambles all bits: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    words = words ^ (words >> np.uint64(30))
    words = words * np.uint64(0xBF58476D1CE4E5B9)
    words = words ^ (words >> np.uint64(27))
    words = words * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def hash_words(*values: int) -> int:
    """A 64-bit hash of a tuple of integers; each is folded in and mixed, so order counts."""
    state = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
    for value in values:
        state = mix(state + np.uint64(value & _MASK)) + np.uint64(0x9E3779B97F4A7C15)
    return int(mix(state)[0])


def permute(positions: Words, size: int, key: int) -> Words:
    """Where a key's permutation of [0, size) sends `positions`; O(len(positions)) time and memory for any size.

    A balanced Feistel network over the next power of four, walked until the value falls below `size`
    (cycle walking: Black and Rogaway 2002). Fewer than four walks are expected.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = [np.uint64(hash_words(key, n)) for n in range(_ROUNDS)]
    result = positions.astype(np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        result[outside] = _feistel(result[outside], half, keys)
        outside = result >= np.uint64(size)
    return result


def _feistel(words: Words, half: np.uint64, keys: list[np.uint64]) -> Words:
    low_bits = (np.uint64(1) << half) - np.uint64(1)
    left, right = words >> half, words & low_bits
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & low_bits)
    return (left << half) | right
