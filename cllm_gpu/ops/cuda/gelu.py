"""GELU with the bias of the preceding linear layer: launches cuda/gelu.cu. As `cllm_gpu.ops.reference.gelu`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes, storage_of
from cllm_gpu.ops.cuda.column_sum import THREADS, column_grid, finish_column_sum
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.variant import Variant


def gelu_forward(launcher: Launcher, x: Any, bias: Any | None, out: Any) -> None:
    """As the reference."""
    check = Shapes("gelu_forward")
    rows, columns = check("x", x, "N M")
    check("bias", bias, "M")
    check("out", out, "N M")
    cut = column_grid(rows, columns, x, out, bias)
    arguments = {"x": x, "bias": bias, "out": out, "rows": rows, "columns": columns}
    launcher.launch(
        Variant("gelu.cu", storage_of("gelu_forward", "x", x)),
        "gelu_forward",
        cut.grid,
        THREADS,
        arguments | {"chunk_rows": cut.chunk_rows, "wide": int(cut.wide)},
    )


def gelu_backward(launcher: Launcher, dout: Any, x: Any, dx: Any, dbias: Any | None, *, accumulate: bool) -> None:
    """As the reference."""
    check = Shapes("gelu_backward")
    rows, columns = check("dout", dout, "N M")
    check("x", x, "N M")
    check("dx", dx, "N M")
    check("dbias", dbias, "M")
    storage = storage_of("gelu_backward", "x", x)
    cut = column_grid(rows, columns, dout, x, dx)
    partials = launcher.scratch("column_sum", (cut.chunks, columns), "float32")
    arguments = {"dout": dout, "x": x, "dx": dx, "partials": partials, "rows": rows, "columns": columns}
    launcher.launch(
        Variant("gelu.cu", storage),
        "gelu_backward",
        cut.grid,
        THREADS,
        arguments | {"chunk_rows": cut.chunk_rows, "wide": int(cut.wide)},
    )
    if dbias is not None:
        finish_column_sum(launcher, storage, partials, dbias, accumulate=accumulate)
