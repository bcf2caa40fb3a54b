"""GELU, tanh approximation (Hendrycks & Gimpel 2016), with the bias of the preceding linear layer.

    h = x + bias,  u = √(2/π)·(h + 0.044715·h³),  gelu(h) = ½·h·(1 + tanh u)

Backward: dh = dout·[½·(1 + tanh u) + ½·h·(1 − tanh² u)·√(2/π)·(1 + 3·0.044715·h²)],  dbias = Σ_rows dh.
"""

from __future__ import annotations

import math
from typing import Any

from cllm_gpu.ops.reference.tiling import row_tiles
from cllm_gpu.ops.specification import operation

SCALE = math.sqrt(2.0 / math.pi)
CUBIC = 0.044715


@operation(writes=("x", "out"))
def gelu_forward(xp: Any, x: Any, bias: Any | None, out: Any) -> None:
    """x (N, M) becomes h = x + bias (M) in place, saved for the backward; out (N, M) = gelu(h)."""
    for rows in row_tiles(xp, *x.shape):
        h, y = x[rows], out[rows]
        if bias is not None:
            h += bias
        _tanh_argument(xp, h, y)
        xp.tanh(y, out=y)
        y += 1.0
        y *= h
        y *= 0.5


@operation(writes=("dx", "dbias"))
def gelu_backward(xp: Any, dout: Any, x: Any, dx: Any, dbias: Any | None, *, accumulate: bool) -> None:
    """From dout (N, M) and the saved h = x (N, M): dx (N, M), which may be dout, and dbias (M) unless None."""
    if dbias is not None and not accumulate:
        dbias[...] = 0.0
    for rows in row_tiles(xp, *x.shape):
        h, g = x[rows], dx[rows]
        t = xp.empty_like(h)
        _tanh_argument(xp, h, t)
        xp.tanh(t, out=t)
        # derivative = ½·[(1 + t) + h·(1 − t²)·(SCALE + 3·SCALE·CUBIC·h²)]
        slope = h * h
        slope *= 3.0 * SCALE * CUBIC
        slope += SCALE
        slope *= h
        curvature = t * t
        xp.subtract(1.0, curvature, out=curvature)
        slope *= curvature
        slope += t
        slope += 1.0
        slope *= 0.5
        xp.multiply(dout[rows], slope, out=g)
        if dbias is not None:
            dbias += g.sum(axis=0)


def _tanh_argument(xp: Any, h: Any, out: Any) -> None:
    """out = SCALE·h·(1 + CUBIC·h²)."""
    xp.multiply(h, h, out=out)
    out *= SCALE * CUBIC
    out += SCALE
    out *= h
