"""Linear layer: out = x Wᵀ + b.

Backward: dx = dout W,  dW = doutᵀ x,  db = Σ_rows dout.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.reference.arguments import require_dtype, require_shape
from cllm_gpu.ops.reference.tiling import row_tiles
from cllm_gpu.ops.specification import operation


@operation(writes=("out",))
def linear_forward(xp: Any, x: Any, weight: Any, bias: Any | None, out: Any) -> None:
    """out (N, M) = x (N, K) · weight (M, K)ᵀ + bias (M)."""
    require_dtype(out.dtype, x=x, weight=weight, bias=bias)
    require_shape("out", out, (x.shape[0], weight.shape[0]))
    require_shape("bias", bias, weight.shape[:1])
    xp.matmul(x, weight.T, out=out)
    if bias is not None:
        out += bias


@operation(writes=("dx", "dweight", "dbias"))
def linear_backward(
    xp: Any,
    dout: Any,
    x: Any,
    weight: Any,
    dx: Any | None,
    dweight: Any,
    dbias: Any | None,
    *,
    accumulate: bool,
) -> None:
    """From dout (N, M): dx (N, K) unless None, dweight (M, K), and dbias (M) unless None."""
    if accumulate:
        for rows in row_tiles(xp, *dweight.shape, tiles=16):  # bounds the temporary that holds the product
            dweight[rows] += xp.matmul(dout[:, rows].T, x)
    else:
        xp.matmul(dout.T, x, out=dweight)
    if dbias is not None:
        column_sum(xp, dout, dbias, accumulate=accumulate)
    if dx is not None:
        xp.matmul(dout, weight, out=dx)


def column_sum(xp: Any, x: Any, out: Any, *, accumulate: bool) -> None:
    """out (M) = Σ_rows x (N, M), added to `out` if `accumulate`."""
    if accumulate:
        out += x.sum(axis=0)
    else:
        xp.sum(x, axis=0, out=out)
