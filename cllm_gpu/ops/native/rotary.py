"""Rotary position embedding; see `cllm_gpu.ops.reference.rotary`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.native.arguments import address, strided
from cllm_gpu.ops.native.library import Library
from cllm_gpu.ops.native.symmetry import symmetry_backward, symmetry_forward
from cllm_gpu.ops.reference.symmetry import Symmetry


def rotary_forward(library: Library, x: Any, cosine: Any, sine: Any, *, symmetry: Symmetry | None = None) -> None:
    """As the reference; x (B, T, H, D) contiguous along D, the tables contiguous."""
    symmetry_forward(library, x, symmetry)
    _rotate(library, x, cosine, sine, 1.0)


def rotary_backward(library: Library, dx: Any, cosine: Any, sine: Any, *, symmetry: Symmetry | None = None) -> None:
    """As the reference; dx (B, T, H, D) contiguous along D, the tables contiguous."""
    _rotate(library, dx, cosine, sine, -1.0)
    symmetry_backward(library, dx, symmetry)


def _rotate(library: Library, x: Any, cosine: Any, sine: Any, direction: float) -> None:
    kernels, dtype = library.kernels(x), x.dtype
    b, t, h, d = x.shape
    if d % 2:
        raise ValueError(f"x has head size {d}; rotary embedding rotates pairs, so it must be even")
    table = (t, d // 2)
    data, strides = strided("x", x, x.shape, dtype)
    kernels.rotary(
        b, t, h, d // 2, data, *strides,
        address("cosine", cosine, table, dtype), address("sine", sine, table, dtype), direction,
    )  # fmt: skip
