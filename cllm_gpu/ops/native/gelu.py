"""GELU with the bias of the preceding linear layer; see `cllm_gpu.ops.reference.gelu`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.native.arguments import address, optional
from cllm_gpu.ops.native.library import Library


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
