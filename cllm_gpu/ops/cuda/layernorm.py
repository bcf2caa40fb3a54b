"""Layer norm, alone and fused with the residual addition: launches cuda/layernorm.cu.

As `cllm_gpu.ops.reference.layernorm`; mean and rstd are always float32.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes, blocks_for, is_wide, storage_of
from cllm_gpu.ops.cuda.column_sum import finish_column_sum
from cllm_gpu.ops.cuda.dropout import mask_arguments
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.utils.errors import UserError

KEPT_ELEMENTS, KEPT_SCALARS = 32, 8  # elements of a row in the registers of one thread: KEPT_PACKS in layernorm.cu
WARPS_PER_BLOCK = 4
FORWARD_LIMIT, BACKWARD_LIMIT = 512, 256  # largest block size: the kernels' launch bounds
MAXIMUM_CHUNKS = 1024


def _split(columns: int, limit: int, *, wide: bool) -> tuple[int, int]:
    """(threads per row, threads per block). One warp per row if its registers hold the row, else one block per row."""
    kept = KEPT_ELEMENTS if wide else KEPT_SCALARS
    if columns <= 32 * kept:
        return 32, 32 * WARPS_PER_BLOCK
    threads = min(limit, 32 * blocks_for(columns, 32 * kept))
    return threads, threads


def _staging_bytes(columns: int, width: int) -> int:
    """Shared memory for two sums per column, padded: 33 places per element for every 32 packs."""
    return 2 * 4 * 33 * width * blocks_for(columns, 32 * width)


def layernorm_forward(
    launcher: Launcher, x: Any, weight: Any, bias: Any | None, out: Any, mean: Any, rstd: Any, *, epsilon: float
) -> None:
    """As the reference; mean and rstd float32."""
    check = Shapes("layernorm_forward")
    rows, columns = check("x", x, "N C")
    _check_common(check, weight, bias, out, mean, rstd)
    wide = is_wide(columns, x, weight, bias, out)
    row_threads, block = _split(columns, FORWARD_LIMIT, wide=wide)
    launcher.launch(
        Variant("layernorm.cu", storage_of("layernorm_forward", "x", x)),
        "layernorm_forward",
        (blocks_for(rows, block // row_threads),),
        block,
        {
            "x": x,
            "weight": weight,
            "bias": bias,
            "out": out,
            "mean": mean,
            "rstd": rstd,
            "rows": rows,
            "columns": columns,
            "epsilon": epsilon,
            "row_threads": row_threads,
            "wide": int(wide),
        },
    )


def residual_layernorm_forward(
    launcher: Launcher,
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
    """As the reference; `branch` is not modified, mean and rstd are float32."""
    check = Shapes("residual_layernorm_forward")
    rows, columns = check("residual", residual, "N C")
    check("branch", branch, "N C")
    check("residual_out", residual_out, "N C")
    _check_common(check, weight, bias, out, mean, rstd)
    wide = is_wide(columns, residual, branch, weight, bias, residual_out, out)
    row_threads, block = _split(columns, FORWARD_LIMIT, wide=wide)
    launcher.launch(
        Variant("layernorm.cu", storage_of("residual_layernorm_forward", "residual", residual)),
        "residual_layernorm_forward",
        (blocks_for(rows, block // row_threads),),
        block,
        {
            "residual": residual,
            "branch": branch,
            "weight": weight,
            "bias": bias,
            "residual_out": residual_out,
            "out": out,
            "mean": mean,
            "rstd": rstd,
            "rows": rows,
            "columns": columns,
            "epsilon": epsilon,
            "row_threads": row_threads,
            "wide": int(wide),
            **mask_arguments(launcher, dropout),
        },
    )


def layernorm_backward(
    launcher: Launcher,
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
    """As the reference. Raises UserError if only one of dbranch and dropout is given."""
    if (dbranch is None) != (dropout is None):
        raise UserError("layernorm_backward: arguments dbranch and dropout are given together or not at all")
    check = Shapes("layernorm_backward")
    rows, columns = check("x", x, "N C")
    for name, array in (("dout", dout), ("dresidual", dresidual), ("dx", dx), ("dbranch", dbranch)):
        check(name, array, "N C")
    for name, array in (("weight", weight), ("dweight", dweight), ("dbias", dbias)):
        check(name, array, "C")
    check("mean", mean, "N")
    check("rstd", rstd, "N")
    storage = storage_of("layernorm_backward", "x", x)
    wide = is_wide(columns, dout, x, weight, dresidual, dx, dbranch)
    row_threads, block = _split(columns, BACKWARD_LIMIT, wide=wide)
    groups = block // row_threads
    chunk_rows = max(2 * groups, blocks_for(rows, MAXIMUM_CHUNKS))
    chunks = blocks_for(rows, chunk_rows)
    partials = launcher.scratch("layernorm", (2, chunks, columns), "float32")
    read = {"dout": dout, "x": x, "weight": weight, "mean": mean, "rstd": rstd, "dresidual": dresidual}
    written = {"dx": dx, "dbranch": dbranch, "partials": partials}
    sizes = {"rows": rows, "columns": columns, "chunk_rows": chunk_rows, "row_threads": row_threads, "wide": int(wide)}
    launcher.launch(
        Variant("layernorm.cu", storage),
        "layernorm_backward",
        (chunks,),
        block,
        read | written | sizes | mask_arguments(launcher, dropout),
        shared_bytes=_staging_bytes(columns, 16 // x.dtype.itemsize if wide else 1) if groups > 1 else 0,
    )
    finish_column_sum(launcher, storage, partials[0], dweight, accumulate=accumulate)
    if dbias is not None:
        finish_column_sum(launcher, storage, partials[1], dbias, accumulate=accumulate)


def _check_common(check: Shapes, weight: Any, bias: Any, out: Any, mean: Any, rstd: Any) -> None:
    check("weight", weight, "C")
    check("bias", bias, "C")
    check("out", out, "N C")
    check("mean", mean, "N")
    check("rstd", rstd, "N")
