"""Philox4x32-10, a counter-based random generator (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy
as 1, 2, 3"): four random 32-bit words as a pure function of a 128-bit counter and a 64-bit key.

Integer arithmetic only, so every array module and every kernel generates the same bits.
"""

from __future__ import annotations

from typing import Any

MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox4x32(xp: Any, counters: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Four uint64 arrays of 32-bit words: the output for each counter (c0, c1, c2, c3: arrays or ints)."""
    c0, c1, c2, c3 = (xp.asarray(c, dtype=xp.uint64) for c in counters)
    k0, k1 = key[0] & _LOW, key[1] & _LOW
    low, shift = xp.uint64(_LOW), xp.uint64(32)
    for _ in range(ROUNDS):
        product0 = c0 * xp.uint64(MULTIPLIER_0)
        product1 = c2 * xp.uint64(MULTIPLIER_1)
        c0 = (product1 >> shift) ^ c1 ^ xp.uint64(k0)
        c2 = (product0 >> shift) ^ c3 ^ xp.uint64(k1)
        c1 = product1 & low
        c3 = product0 & low
        k0, k1 = (k0 + WEYL_0) & _LOW, (k1 + WEYL_1) & _LOW
    return c0, c1, c2, c3


def random_words(xp: Any, first: int, count: int, *, seed: int, stream: tuple[int, int]) -> Any:
    """Words `first` … `first + count − 1` of the random sequence of `seed` and `stream`, uint32 (count,).

    Word i is component i mod 4 of Philox at counter (i div 4 low, i div 4 high, *stream), with the 64-bit seed as key.
    """
    start, stop = first // 4, (first + count + 3) // 4
    blocks = xp.arange(start, stop, dtype=xp.uint64)
    low, high = blocks & xp.uint64(_LOW), blocks >> xp.uint64(32)
    words = philox4x32(xp, (low, high, stream[0] & _LOW, stream[1] & _LOW), (seed & _LOW, seed >> 32))
    flat = xp.stack(words, axis=1).astype(xp.uint32).reshape(-1)
    return flat[first - 4 * start : first - 4 * start + count]
