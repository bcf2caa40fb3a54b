"""Layer norm, alone and fused with the residual addition; see `cllm_gpu.ops.reference.layernorm`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.native.arguments import address, optional
from cllm_gpu.ops.native.dropout import dropout_backward, dropout_forward
from cllm_gpu.ops.native.library import Library
from cllm_gpu.ops.reference.dropout import Dropout


def layernorm_forward(
    library: Library, x: Any, weight: Any, bias: Any | None, out: Any, mean: Any, rstd: Any, *, epsilon: float
) -> None:
    """As the reference; all arrays contiguous."""
    kernels, dtype, shape = library.kernels(x), x.dtype, x.shape
    n, c = shape
    kernels.layernorm_forward(
        n, c,
        address("x", x, shape, dtype),
        address("weight", weight, (c,), dtype),
        optional("bias", bias, (c,), dtype),
        address("out", out, shape, dtype),
        address("mean", mean, (n,), dtype),
        address("rstd", rstd, (n,), dtype),
        epsilon,
    )  # fmt: skip


def residual_layernorm_forward(
    library: Library,
    residual: Any,
    branch: Any,
    weight: Any,
    bias: Any | None,
    residual_out: Any,
    out: Any,
    mean: Any,
    rstd: Any,
    *,
    epsilon: float,
    dropout: Dropout | None,
) -> None:
    """As the reference; all arrays contiguous."""
    if dropout is not None:
        dropout_forward(library, branch, branch, dropout=dropout)
    kernels, dtype, shape = library.kernels(residual), residual.dtype, residual.shape
    n, c = shape
    kernels.residual_layernorm_forward(
        n, c,
        address("residual", residual, shape, dtype),
        address("branch", branch, shape, dtype),
        address("weight", weight, (c,), dtype),
        optional("bias", bias, (c,), dtype),
        address("residual_out", residual_out, shape, dtype),
        address("out", out, shape, dtype),
        address("mean", mean, (n,), dtype),
        address("rstd", rstd, (n,), dtype),
        epsilon,
    )  # fmt: skip


def layernorm_backward(
    library: Library,
    dout: Any,
    x: Any,
    weight: Any,
    mean: Any,
    rstd: Any,
    dresidual: Any | None,
    dx: Any,
    dbranch: Any | None,
    dweight: Any,
    dbias: Any | None,
    *,
    accumulate: bool,
    dropout: Dropout | None,
) -> None:
    """As the reference; all arrays contiguous."""
    kernels, dtype, shape = library.kernels(x), x.dtype, x.shape
    n, c = shape
    kernels.layernorm_backward(
        n, c,
        address("dout", dout, shape, dtype),
        address("x", x, shape, dtype),
        address("weight", weight, (c,), dtype),
        address("mean", mean, (n,), dtype),
        address("rstd", rstd, (n,), dtype),
        optional("dresidual", dresidual, shape, dtype),
        address("dx", dx, shape, dtype),
        address("dweight", dweight, (c,), dtype),
        optional("dbias", dbias, (c,), dtype),
        accumulate,
    )  # fmt: skip
    if dropout is not None:
        dropout_backward(library, dx, dbranch, dropout=dropout)
