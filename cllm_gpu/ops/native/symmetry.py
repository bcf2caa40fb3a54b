"""The lattice's symmetry, for attention and the rotary embedding; see `cllm_gpu.ops.reference.symmetry`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.native.arguments import INT32, address, strided
from cllm_gpu.ops.native.library import Library, check_status
from cllm_gpu.ops.reference.symmetry import ELEMENTS, Symmetry


def symmetry_forward(library: Library, x: Any, symmetry: Symmetry | None) -> None:
    """As the reference; x (B, T, H, D) contiguous along D, `turns` of its dtype. No effect if `symmetry` is None."""
    if symmetry is not None:
        _apply(library, "x", x, symmetry, backward=False)


def symmetry_backward(library: Library, dx: Any, symmetry: Symmetry | None) -> None:
    """As the reference; dx (B, T, H, D) contiguous along D, `turns` of its dtype. No effect if `symmetry` is None."""
    if symmetry is not None:
        _apply(library, "dx", dx, symmetry, backward=True)


def turned(library: Library, x: Any, symmetry: Symmetry | None) -> Any:
    """S(e) x as a new array; x itself if `symmetry` is None."""
    if symmetry is None:
        return x
    y = x.copy()
    _apply(library, "x", y, symmetry, backward=False)
    return y


def _apply(library: Library, name: str, x: Any, symmetry: Symmetry, *, backward: bool) -> None:
    kernels, dtype = library.kernels(x), x.dtype
    (b, t, h, d), pairs = x.shape, symmetry.pairs
    if 2 * pairs > d:
        raise ValueError(f"symmetry has {pairs} pairs, which is more than the {d} dimensions of {name} hold")
    if symmetry.tokens.dtype != INT32 or symmetry.tokens.shape[0] != b or symmetry.tokens.shape[1] < t:
        raise ValueError(
            f"symmetry.tokens is {symmetry.tokens.dtype} {symmetry.tokens.shape}; expected int32, at least ({b}, {t})"
        )
    elements = symmetry.elements(t)
    data, strides = strided(name, x, x.shape, dtype)
    status = kernels.symmetry(
        b, t, h, d, pairs, data, *strides,
        address("elements", elements, (b, t), INT32),
        address("symmetry.turns", symmetry.turns, (ELEMENTS, pairs, 2), dtype),
        backward,
    )  # fmt: skip
    if status:
        check_status(status, "elements", ELEMENTS)
