"""The lattice's symmetry as arguments of kernels (cuda/symmetry.cuh). As `cllm_gpu.ops.reference.symmetry`.

The attention and rotary kernels apply it; this module checks its arrays and selects the variant.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes, address_of, element_strides
from cllm_gpu.ops.reference.symmetry import ELEMENTS, Symmetry
from cllm_gpu.utils.errors import UserError


def symmetry_defines(symmetry: Symmetry | None) -> tuple[tuple[str, int], ...]:
    """Macros that compile a source with this symmetry; () for None."""
    return () if symmetry is None else (("SYMMETRY_PAIRS", symmetry.pairs),)


def check_symmetry(check: Shapes, symmetry: Symmetry, size: int) -> None:
    """Raise UserError unless tokens (B, S), turns and pairs fit the shapes checked before and the head size `size`."""
    operation, tables = check.operation, Shapes(check.operation, E=ELEMENTS)
    check("symmetry.tokens", symmetry.tokens, "B S")
    _, pairs, parts = tables("symmetry.turns", symmetry.turns, "E P C")
    if parts != 2 or address_of(symmetry.turns) % 16:
        raise UserError(f"{operation}: symmetry.turns must hold a cosine and a sine a pair, aligned to 16 bytes")
    if not 1 <= pairs <= size // 2:
        raise UserError(
            f"{operation}: argument symmetry has {pairs} pairs; a head of {size} dimensions takes 1 to {size // 2}"
        )


def symmetry_arguments(operation: str, symmetry: Symmetry | None) -> dict[str, Any]:
    """The symmetry as SymmetryInputs of symmetry.cuh; null pointers if there is none."""
    if symmetry is None:
        return {"symmetry.tokens": None, "symmetry.turns": None, "symmetry.tokens_batch": 0}
    return {
        "symmetry.tokens": symmetry.tokens,
        "symmetry.turns": symmetry.turns,
        "symmetry.tokens_batch": element_strides(operation, "symmetry.tokens", symmetry.tokens)[0],
    }
