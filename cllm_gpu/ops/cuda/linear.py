"""Linear layer: matrix products with the bias and its gradient as epilogues. As `cllm_gpu.ops.reference.linear`.

If no epilogue is available (see `gemm`), cuda/column_sum.cu adds the bias and sums its gradient.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes, storage_of
from cllm_gpu.ops.cuda.column_sum import THREADS, column_grid, column_sum, finish_column_sum
from cllm_gpu.ops.cuda.epilogue import Epilogue
from cllm_gpu.ops.cuda.gemm import matmul, matmul_with
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.variant import Variant


def linear_forward(launcher: Launcher, x: Any, weight: Any, bias: Any | None, out: Any) -> None:
    """As the reference."""
    check = Shapes("linear_forward")
    check("x", x, "N K")
    check("weight", weight, "M K")
    rows, columns = check("out", out, "N M")
    check("bias", bias, "M")
    if bias is not None and matmul_with(launcher, x, weight.T, out, Epilogue("bias", bias)):
        return
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
    """As the reference."""
    check = Shapes("linear_backward")
    check("dout", dout, "N M")
    check("x", x, "N K")
    check("weight", weight, "M K")
    check("dx", dx, "N K")
    check("dweight", dweight, "M K")
    check("dbias", dbias, "M")
    _weight_gradients(launcher, dout, x, dweight, dbias, accumulate=accumulate)
    if dx is not None:
        matmul(launcher, dout, weight, dx)


def _weight_gradients(
    launcher: Launcher, dout: Any, x: Any, dweight: Any, dbias: Any | None, *, accumulate: bool
) -> None:
    """dweight and dbias. The epilogue overwrites its vector, so to accumulate it gets a float32 scratch vector."""
    fused = False
    if dbias is not None:
        vector = launcher.scratch("bias_gradient", dbias.shape, "float32") if accumulate else dbias
        epilogue = Epilogue("bias gradient", vector)
        fused = matmul_with(launcher, dout.T, x, dweight, epilogue, accumulate=accumulate)
        if fused and accumulate:
            finish_column_sum(launcher, dout.dtype.name, vector.reshape(1, -1), dbias, accumulate=True)
    if not fused:
        matmul(launcher, dout.T, x, dweight, accumulate=accumulate)
        if dbias is not None:
            column_sum(launcher, dout, dbias, accumulate=accumulate)
