"""Inverted dropout; see `cllm_gpu.ops.reference.dropout`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.native.arguments import address
from cllm_gpu.ops.native.library import Library
from cllm_gpu.ops.reference.dropout import Dropout

_WORD, _LONG = 2**32 - 1, 2**64 - 1


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
