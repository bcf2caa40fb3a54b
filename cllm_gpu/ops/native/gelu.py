"""GELU and dropout; see `cllm_gpu.ops.reference.gelu` and `cllm_gpu.ops.reference.dropout`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.native.arguments import address, optional
from cllm_gpu.ops.native.library import Library
from cllm_gpu.ops.reference.dropout import Dropout

_WORD, _LONG = 2**32 - 1, 2**64 - 1


def gelu_forward(library: Library, x: Any, bias: Any | None, out: Any) -> None:
    """As the reference; all arrays contiguous."""
    kernels, dtype, shape = library.kernels(x), x.dtype, x.shape
    n, m = shape
    kernels.gelu_forward(
        n, m, address("x", x, shape, dtype), optional("bias", bias, (m,), dtype), address("out", out, shape, dtype)
    )


def gelu_backward(library: Library, dout: Any, x: Any, dx: Any, dbias: Any | None, *, accumulate: bool) -> None:
    """As the reference; all arrays contiguous."""
    kernels, dtype, shape = library.kernels(x), x.dtype, x.shape
    n, m = shape
    kernels.gelu_backward(
        n, m,
        address("dout", dout, shape, dtype),
        address("x", x, shape, dtype),
        address("dx", dx, shape, dtype),
        optional("dbias", dbias, (m,), dtype),
        accumulate,
    )  # fmt: skip


def dropout_forward(library: Library, x: Any, out: Any, *, dropout: Dropout) -> None:
    """As the reference, bit for bit; both arrays contiguous."""
    kernels, dtype = library.kernels(x), x.dtype
    kernels.dropout(
        x.size,
        address("x", x, x.shape, dtype),
        address("out", out, x.shape, dtype),
        dropout.first_element,
        dropout.seed & _LONG,
        dropout.step & _WORD,
        dropout.site & _WORD,
        dropout.threshold,
        dropout.scale,
    )


def dropout_backward(library: Library, dout: Any, dx: Any, *, dropout: Dropout) -> None:
    """As the reference, bit for bit; both arrays contiguous."""
    dropout_forward(library, dout, dx, dropout=dropout)
