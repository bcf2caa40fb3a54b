"""Affine map: cuBLAS products, and cuda/column_sum.cu for the bias and its gradient. As `cllm_gpu.reference.linear`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.fused.columns import THREADS, column_grid, column_sum
from cllm_gpu.fused.gemm import matmul
from cllm_gpu.fused.launcher import Launcher, Shapes, Variant, storage_of


def linear_forward(launcher: Launcher, x: Any, weight: Any, bias: Any | None, out: Any) -> None:
    """out (N, M) = x (N, K) · weight (M, K)ᵀ + bias (M)."""
    check = Shapes("linear_forward")
    check("x", x, "N K")
    check("weight", weight, "M K")
    rows, columns = check("out", out, "N M")
    check("bias", bias, "M")
    matmul(launcher, x, weight.T, out)
    if bias is None:
        return
    cut = column_grid(rows, columns, out, bias)
    arguments = {"x": out, "bias": bias, "rows": rows, "columns": columns}
    launcher.launch(
        Variant("column_sum.cu", storage_of("linear_forward", "out", out)),
        "bias_add",
        cut.grid,
        THREADS,
        arguments | {"chunk_rows": cut.chunk_rows, "wide": int(cut.wide)},
    )


def linear_backward(
    launcher: Launcher,
    dout: Any,
    x: Any,
    weight: Any,
    dx: Any | None,
    dweight: Any,
    dbias: Any | None,
    *,
    accumulate: bool,
) -> None:
    """From dout (N, M): dx (N, K), unless None; dweight (M, K) and dbias (M), unless None."""
    check = Shapes("linear_backward")
    check("dout", dout, "N M")
    check("x", x, "N K")
    check("weight", weight, "M K")
    check("dx", dx, "N K")
    check("dweight", dweight, "M K")
    check("dbias", dbias, "M")
    matmul(launcher, dout.T, x, dweight, accumulate=accumulate)
    if dbias is not None:
        column_sum(launcher, dout, dbias, accumulate=accumulate)
    if dx is not None:
        matmul(launcher, dout, weight, dx)
