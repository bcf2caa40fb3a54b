"""The lattice's symmetry on head dimensions: S(e) of the dihedral group D₁₂ on consecutive pairs (2m, 2m + 1).

    (x, y) → (c·x − s·σy, s·x + c·σy),  c, s = cos, sin of the element's angle for pair m, σ = −1 for a reflection

It acts on the first dimensions, as many pairs as the tables have; the others stay. S is orthogonal, so the backward is
its transpose: (u, w) → (c·u + s·w, σ(c·w − s·u)). The first operation that takes queries and keys applies it as it
reads them, and undoes it on their gradients: the rotary embedding if the model has one, else attention. So S comes
before the rotation, and with it scores still depend on how far apart two positions are, not on where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROTATIONS = 12
ELEMENTS = 2 * ROTATIONS
"""Order of the group D₁₂. Elements from ROTATIONS on are reflections."""


@dataclass(frozen=True)
class Symmetry:
    """Tokens, whose group elements act, and the table of the elements' actions."""

    tokens: Any
    """(B, S) int32: the token at every position; an array of T < S positions takes the last T."""
    turns: Any
    """(24, P, 2): c and s by element and pair (`cllm_gpu.model.lattice.symmetry_turns`); float32, or the dtype of
    the array it acts on. The second half of the elements are reflections."""

    @property
    def pairs(self) -> int:
        """P, number of pairs of dimensions it acts on."""
        return int(self.turns.shape[1])

    def elements(self, length: int) -> Any:
        """e = token mod 24 of the last `length` positions, (B, length) int32."""
        return self.tokens[:, self.tokens.shape[1] - length :] % self.turns.shape[0]


def symmetry_forward(xp: Any, x: Any, symmetry: Symmetry) -> None:
    """Apply S(e) to x (B, T, H, D), any strides, in place."""
    for item, c, s, reflected in _items(x, symmetry):
        first, second = item[..., 0 : 2 * symmetry.pairs : 2], item[..., 1 : 2 * symmetry.pairs : 2]
        y = xp.where(reflected, -second, second)
        second[...] = s * first + c * y
        first[...] = c * first - s * y


def symmetry_backward(xp: Any, dx: Any, symmetry: Symmetry) -> None:
    """Apply S(e)ᵀ to the gradient dx (B, T, H, D) in place."""
    for item, c, s, reflected in _items(dx, symmetry):
        first, second = item[..., 0 : 2 * symmetry.pairs : 2], item[..., 1 : 2 * symmetry.pairs : 2]
        x = c * first + s * second
        y = c * second - s * first
        second[...] = xp.where(reflected, -y, y)
        first[...] = x


def turned(xp: Any, x: Any, symmetry: Symmetry | None) -> Any:
    """S(e) x as a new array; x itself if `symmetry` is None."""
    if symmetry is None:
        return x
    y = x.copy()
    symmetry_forward(xp, y, symmetry)
    return y


def _items(x: Any, symmetry: Symmetry) -> Any:
    """Each batch item (T, H, D), its c and s (T, 1, P), and whether it reflects (T, 1, 1); bounds the temporaries."""
    reflections = symmetry.turns.shape[0] // 2
    for item, element in zip(x, symmetry.elements(x.shape[1]), strict=True):
        turns = symmetry.turns[element][:, None]
        yield item, turns[..., 0], turns[..., 1], (element >= reflections)[:, None, None]
