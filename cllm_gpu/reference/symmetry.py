"""The lattice's symmetry on head dimensions: S(e) of the dihedral group D₁₂ on consecutive pairs (2m, 2m + 1).

    (x, y) → (c·x − s·σy, s·x + c·σy),  c, s = cos, sin of the element's angle for pair m, σ = −1 for a reflection

It acts on the first dimensions, as many pairs as the tables have; the others stay. S is orthogonal, so the backward is
its transpose: (u, w) → (c·u + s·w, σ(c·w − s·u)).
"""

from __future__ import annotations

from typing import Any


def symmetry_forward(xp: Any, x: Any, elements: Any, cosine: Any, sine: Any, sign: Any) -> None:
    """Apply S(e) to x (B, T, H, D), any strides, in place; elements (B, T) of 0 … 23, tables (24, P), sign (24,)."""
    pairs = cosine.shape[1]
    for item, element in zip(x, elements, strict=True):  # one batch item at a time bounds the temporaries
        c, s = cosine[element][:, None], sine[element][:, None]  # (T, 1, P)
        first, second = item[..., 0 : 2 * pairs : 2], item[..., 1 : 2 * pairs : 2]
        y = second * sign[element][:, None, None]
        second[...] = s * first + c * y
        first[...] = c * first - s * y


def symmetry_backward(xp: Any, dx: Any, elements: Any, cosine: Any, sine: Any, sign: Any) -> None:
    """Apply S(e)ᵀ to the gradient dx (B, T, H, D) in place."""
    pairs = cosine.shape[1]
    for item, element in zip(dx, elements, strict=True):
        c, s = cosine[element][:, None], sine[element][:, None]
        first, second = item[..., 0 : 2 * pairs : 2], item[..., 1 : 2 * pairs : 2]
        x = c * first + s * second
        second[...] = (c * second - s * first) * sign[element][:, None, None]
        first[...] = x
