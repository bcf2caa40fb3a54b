"""Stochastic gradient descent with momentum on flat buffers (the form of Sutskever et al. 2013 that PyTorch uses).

g = gradient_scale·gradient + weight_decay·p;   u = momentum·u + g;   p −= rate·u
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.reference.rounding import StochasticRounding, subtract, widened
from cllm_gpu.ops.reference.tiling import row_tiles
from cllm_gpu.ops.specification import operation


@operation(writes=("parameters", "velocity", "copy"), flat=True)
def sgd_step(
    xp: Any,
    parameters: Any,
    gradients: Any,
    velocity: Any | None,
    copy: Any | None = None,
    *,
    rate: float,
    momentum: float,
    weight_decay: float,
    decayed: int,
    gradient_scale: float,
    rounding: StochasticRounding | None = None,
) -> float:
    """One step in place on flat arrays (n,); returns Σ update² in float64.

    `velocity` (n,) starts at zero; None without momentum. The first `decayed` elements get weight decay. Gradients may
    be bfloat16. `copy` (n,), possibly bfloat16, receives the rounded parameters. With `rounding` the parameters
    themselves are bfloat16 and `copy` is None.
    """
    moved = 0.0
    for segment, decay in ((slice(0, decayed), weight_decay), (slice(decayed, parameters.size), 0.0)):
        for part in row_tiles(xp, segment.stop, 1, first=segment.start):
            update = widened(gradients[part]) * gradient_scale
            if decay:
                update += decay * widened(parameters[part])
            if velocity is not None:
                velocity[part] *= momentum
                velocity[part] += update
                update[...] = velocity[part]
            update *= rate
            subtract(xp, parameters, copy, part, update, rounding)
            moved += float(xp.sum(update * update, dtype=xp.float64))
    return moved
