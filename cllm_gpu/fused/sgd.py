"""Stochastic gradient descent with momentum: launches cuda/adam.cu's sgd_step. As `cllm_gpu.reference.sgd`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.fused.launcher import Launcher, Shapes, storage_of
from cllm_gpu.fused.norm import THREADS, finish_sum, flat_blocks
from cllm_gpu.fused.weights import weight_arguments
from cllm_gpu.reference.rounding import StochasticRounding


def sgd_step(
    launcher: Launcher,
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

    `velocity` (n,) starts at zero and is None without momentum; the first `decayed` elements get weight decay.
    Gradients may be bfloat16, as `copy` (n,), which gets the parameters rounded. With `rounding` the parameters
    themselves are bfloat16 and there is no copy.
    """
    check = Shapes("sgd_step")
    (size,) = check("parameters", parameters, "n")
    check("gradients", gradients, "n")
    check("velocity", velocity, "n")
    if size == 0:
        return 0.0
    storage = storage_of("sgd_step", "gradients", gradients)
    blocks = flat_blocks(size)
    moved = launcher.scratch("squares", (blocks,), "float64")
    variant, weights = weight_arguments("sgd_step", storage, parameters, copy, rounding)
    launcher.launch(
        variant,
        "sgd_step",
        (blocks,),
        THREADS,
        weights
        | {
            "gradients": gradients,
            "velocity": velocity,
            "clip": None,
            "skip": None,
            "moved": moved,
            "size": size,
            "decayed": decayed,
            "scale": gradient_scale,
            "momentum": momentum if velocity is not None else 0.0,
            "decay": weight_decay,
            "rate": rate,
            "zero_gradients": 0,
        },
    )
    return float(finish_sum(launcher, storage, moved)[0])
