"""Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019) on flat buffers.

g = gradient_scale·gradient (+ weight_decay·p, Adam only)
m = β1·m + (1 − β1)·g,   v = β2·v + (1 − β2)·g²
p −= rate·( (m/(1 − β1^t)) / (√(v/(1 − β2^t)) + ε) (+ weight_decay·p, AdamW only) )
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.reference.rounding import StochasticRounding, subtract, widened
from cllm_gpu.ops.reference.tiling import row_tiles
from cllm_gpu.ops.specification import operation


@operation(writes=("parameters", "first_moment", "second_moment", "copy"), flat=True)
def adam_step(
    xp: Any,
    parameters: Any,
    gradients: Any,
    first_moment: Any,
    second_moment: Any,
    copy: Any | None = None,
    *,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    weight_decay: float,
    decayed: int,
    decoupled: bool,
    gradient_scale: float,
    rounding: StochasticRounding | None = None,
) -> float:
    """One step in place on four flat arrays (n,); returns Σ update² in float64.

    `step` counts from 1. The first `decayed` elements get weight decay. `gradient_scale` (clipping) multiplies every
    gradient. `decoupled` selects AdamW. Gradients are only read and may be bfloat16. `copy` (n,), possibly bfloat16,
    receives the rounded parameters. With `rounding` the parameters themselves are bfloat16 and `copy` is None.
    """
    correction1 = 1.0 - beta1**step
    correction2 = 1.0 - beta2**step
    moved = 0.0
    g, m, v = gradients, first_moment, second_moment
    for segment, decay in ((slice(0, decayed), weight_decay), (slice(decayed, parameters.size), 0.0)):
        for part in row_tiles(xp, segment.stop, 1, first=segment.start):
            p = widened(parameters[part])
            gradient = widened(g[part]) * gradient_scale
            if decay and not decoupled:
                gradient += decay * p
            m[part] *= beta1
            m[part] += (1.0 - beta1) * gradient
            gradient *= gradient
            v[part] *= beta2
            v[part] += (1.0 - beta2) * gradient
            denominator = xp.sqrt(v[part] / correction2)
            denominator += epsilon
            update = m[part] / denominator
            update *= rate / correction1
            if decay and decoupled:
                update += (rate * decay) * p
            subtract(xp, parameters, copy, part, update, rounding)
            moved += float(xp.sum(update * update, dtype=xp.float64))
    return moved
