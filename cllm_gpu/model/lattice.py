"""The crystalline lattice: every token id has a prime, a point in space and an element of a symmetry group.

    prime        p(t): the prime with index t; p(0) = 2, p(1) = 3, …
    point        c(t) = (r·cos θ, r·sin θ, z),  r = √((t + ½)/V),  θ = 2π·t/φ² (the golden angle, φ = (1 + √5)/2),
                 z = ln p(t) / ln p(V − 1)
    element      e(t) = t mod 24 of the dihedral group D₁₂: 12 rotations, 12 reflections

All are functions of the token id t (0 ≤ t < V) alone, computed once in float64. The points in the plane are Vogel's
(1979, "A better way to construct the sunflower head"). What attention makes of them:
`cllm_gpu.ops.reference.score_bias` and `cllm_gpu.ops.reference.symmetry`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_gpu.ops.reference.symmetry import ELEMENTS, ROTATIONS
from cllm_gpu.utils.errors import UserError

GOLDEN_ANGLE = 2.0 * math.pi / ((1.0 + math.sqrt(5.0)) / 2.0) ** 2


@dataclass(frozen=True)
class LatticeInputs:
    """What crystalline attention knows of the tokens of one batch."""

    tokens: Any
    """(B, S) int32, those in the cache included."""
    points: Any
    """(B, S, 3), None if no term uses them."""


def primes(count: int) -> npt.NDArray[np.int64]:
    """The first `count` primes, (count,): the sieve of Eratosthenes. UserError for a negative count."""
    if count < 0:
        raise UserError(f"{count} primes asked for; the count must be at least 0")
    limit = _bound_of_prime(count)
    composite = np.zeros(limit + 1, dtype=bool)
    composite[:2] = True
    for n in range(2, math.isqrt(limit) + 1):
        if not composite[n]:
            composite[n * n :: n] = True
    return np.flatnonzero(~composite)[:count].astype(np.int64)


def _bound_of_prime(count: int) -> int:
    """A number that the prime number `count` does not pass: n·(ln n + ln ln n) from n = 6 on (Rosser 1941)."""
    if count < 6:
        return 11
    return math.ceil(count * (math.log(count) + math.log(math.log(count))))


def lattice_points(vocabulary: int) -> npt.NDArray[np.float64]:
    """c(t) for every token id, (V, 3)."""
    ids = np.arange(vocabulary, dtype=np.float64)
    radius = np.sqrt((ids + 0.5) / vocabulary)
    angle = GOLDEN_ANGLE * ids
    heights = np.log(primes(vocabulary).astype(np.float64))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), heights / heights[-1]], axis=1)


def symmetry_turns(pairs: int) -> npt.NDArray[np.float64]:
    """cos and sin of every element's operation on `pairs` pairs, (24, pairs, 2).

    Element e turns pair m by 2π·(e mod 12)/12 times its harmonic, m + 1; from 12 on it first reflects (x, y → x, −y).
    """
    elements = np.arange(ELEMENTS)
    # the angle modulo a whole turn in exact integers: so twelve twelfths are none, and reflections repeat exactly
    twelfths = (elements % ROTATIONS)[:, None] * np.arange(1, pairs + 1)[None, :] % ROTATIONS
    angles = 2.0 * np.pi / ROTATIONS * twelfths
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)
