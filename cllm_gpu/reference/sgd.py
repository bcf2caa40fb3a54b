"""Stochastic gradient descent with momentum on flat buffers (the form of Sutskever et al. 2013 that PyTorch uses).

g = gradient_scale·gradient + weight_decay·p;   u = momentum·u + g;   p −= rate·u
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.reference.tiling import row_tiles


def sgd_step(
    xp: Any,
    parameters: Any,
    gradients: Any,
    velocity: Any | None,
    *,
    rate: float,
    momentum: float,
    weight_decay: float,
    decayed: int,
    gradient_scale: float,
) -> float:
    """One step in place on flat arrays (n,); returns Σ update² in float64.

    `velocity` (n,) starts at zero and is None without momentum; the first `decayed` elements get weight decay.
    """
    moved = 0.0
    for segment, decay in ((slice(0, decayed), weight_decay), (slice(decayed, parameters.size), 0.0)):
        p, g = parameters[segment], gradients[segment]
        u = None if velocity is None else velocity[segment]
        for part in row_tiles(xp, p.size, 1):
            update = g[part] * gradient_scale
            if decay:
                update += decay * p[part]
            if u is not None:
                u[part] *= momentum
                u[part] += update
                update[...] = u[part]
            update *= rate
            p[part] -= update
            moved += float(xp.sum(update * update, dtype=xp.float64))
    return moved
