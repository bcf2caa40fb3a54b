"""Rotary position embedding (RoPE, Su et al. 2021, "RoFormer"), on pairs (m, m + D/2) of head dimensions.

At position p pair m is rotated by the angle p·base^(−2m/D): (a, b) → (a·cos − b·sin, a·sin + b·cos).
A rotation is orthogonal, so the backward is the rotation by the opposite angle. A `symmetry` of the lattice, S(e), is
applied before the rotation (`cllm_gpu.ops.reference.symmetry`), and its transpose after the backward's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm_gpu.ops.reference.symmetry import Symmetry, symmetry_backward, symmetry_forward
from cllm_gpu.ops.specification import operation

BASE = 10000.0


def rotary_tables(xp: Any, positions: int, head_size: int, dtype: Any) -> tuple[Any, Any]:
    """cos and sin, each (positions, D/2), computed in float64 on the host so that every device has the same bits."""
    pairs = np.arange(head_size // 2, dtype=np.float64)
    angles = np.arange(positions, dtype=np.float64)[:, None] * BASE ** (-2.0 * pairs / head_size)
    return xp.asarray(np.cos(angles).astype(dtype)), xp.asarray(np.sin(angles).astype(dtype))


@operation(writes=("x",))
def rotary_forward(xp: Any, x: Any, cosine: Any, sine: Any, *, symmetry: Symmetry | None = None) -> None:
    """Rotate x (B, T, H, D), any strides, in place; cosine and sine are (T, D/2)."""
    if symmetry is not None:
        symmetry_forward(xp, x, symmetry)
    _rotate(x, cosine[:, None, :], sine[:, None, :])


@operation(writes=("dx",))
def rotary_backward(xp: Any, dx: Any, cosine: Any, sine: Any, *, symmetry: Symmetry | None = None) -> None:
    """Rotate the gradient dx (B, T, H, D) back in place."""
    _rotate(dx, cosine[:, None, :], -sine[:, None, :])
    if symmetry is not None:
        symmetry_backward(xp, dx, symmetry)


def _rotate(x: Any, cosine: Any, sine: Any) -> None:
    half = x.shape[-1] // 2
    for item in x:  # one batch item at a time bounds the temporaries
        first, second = item[..., :half], item[..., half:]
        rotated = first * cosine - second * sine
        second *= cosine
        second += first * sine
        first[...] = rotated
