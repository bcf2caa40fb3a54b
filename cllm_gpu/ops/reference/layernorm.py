"""Layer norm (Ba et al. 2016), alone and fused with the preceding residual addition.

    x̂ = (x − mean)·rstd,  rstd = 1/√(var + ε),  out = x̂·γ + β      (mean and var over the last axis, var biased)

Backward, with g = dout·γ:  dx = rstd·(g − mean(g) − x̂·mean(g·x̂)),  dγ = Σ dout·x̂,  dβ = Σ dout. With the residual
addition, the gradient of the residual stream is added to dx, and the branch's gradient is dx through its dropout.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.reference.dropout import Dropout, dropout_backward, dropout_forward
from cllm_gpu.ops.reference.tiling import row_tiles
from cllm_gpu.ops.specification import operation


@operation(writes=("out", "mean", "rstd"))
def layernorm_forward(
    xp: Any, x: Any, weight: Any, bias: Any | None, out: Any, mean: Any, rstd: Any, *, epsilon: float
) -> None:
    """out (N, C) = layer norm of x (N, C) with weight and bias (C); mean and rstd (N) are saved for the backward."""
    for rows in row_tiles(xp, *x.shape):
        y = out[rows]
        mean[rows] = x[rows].mean(axis=1)
        xp.subtract(x[rows], mean[rows, None], out=y)
        variance = xp.mean(y * y, axis=1)
        variance += epsilon
        rstd[rows] = 1.0 / xp.sqrt(variance)
        y *= rstd[rows, None]
        y *= weight
        if bias is not None:
            y += bias


@operation(writes=("branch", "residual_out", "out", "mean", "rstd"))
def residual_layernorm_forward(
    xp: Any,
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
    """residual_out (N, C) = residual + dropout(branch); out (N, C) = layer norm of residual_out.

    `branch` (N, C) may be overwritten; `residual_out` may be `residual`. Otherwise as `layernorm_forward`.
    """
    if dropout is not None:
        dropout_forward(xp, branch, branch, dropout=dropout)
    xp.add(residual, branch, out=residual_out)
    layernorm_forward(xp, residual_out, weight, bias, out, mean, rstd, epsilon=epsilon)


@operation(writes=("dx", "dbranch", "dweight", "dbias"))
def layernorm_backward(
    xp: Any,
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
    """From dout (N, C) and the saved values: dx (N, C) = gradient of x, plus `dresidual` (N, C) unless None.

    `dx` may be `dresidual`, to add to the residual stream's gradient in place. With `dropout`, also
    dbranch (N, C) = dx·mask/(1 − rate), which may be `dout` or `dx`; without, `dbranch` is None.
    """
    if not accumulate:
        dweight[...] = 0.0
        if dbias is not None:
            dbias[...] = 0.0
    for rows in row_tiles(xp, *x.shape):
        normalised = x[rows] - mean[rows, None]
        normalised *= rstd[rows, None]
        dweight += (dout[rows] * normalised).sum(axis=0)
        if dbias is not None:
            dbias += dout[rows].sum(axis=0)
        g = dout[rows] * weight
        g_mean = g.mean(axis=1, keepdims=True)
        g_correlation = (g * normalised).mean(axis=1, keepdims=True)
        normalised *= g_correlation
        g -= g_mean
        g -= normalised
        g *= rstd[rows, None]
        if dresidual is None:
            dx[rows] = g
        else:
            xp.add(dresidual[rows], g, out=dx[rows])
    if dropout is not None:
        dropout_backward(xp, dx, dbranch, dropout=dropout)
