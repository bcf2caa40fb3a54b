"""Stochastic gradient descent with momentum: launches cuda/adam.cu's sgd_step. As `cllm_gpu.ops.reference.sgd`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.optimizer_weights import weight_arguments
from cllm_gpu.ops.cuda.squared_norm import THREADS, finish_sum, flat_blocks
from cllm_gpu.ops.reference.rounding import StochasticRounding


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
    """As the reference; synchronizes with the device."""
    if parameters.size == 0:
        return 0.0
    moved = sgd_step_on_device(
        launcher,
        parameters,
        gradients,
        velocity,
        copy,
        rate=rate,
        momentum=momentum,
        weight_decay=weight_decay,
        decayed=decayed,
        gradient_scale=gradient_scale,
        rounding=rounding,
    )
    return float(moved[0])


def sgd_step_on_device(
    launcher: Launcher,
    parameters: Any,
    gradients: Any,
    velocity: Any | None,
    copy: Any | None = None,
    *,
    momentum: float,
    weight_decay: float,
    decayed: int,
    gradient_scale: float,
    rate: float = 0.0,
    numbers: Any | None = None,
    rounding: StochasticRounding | None = None,
    clip: Any | None = None,
    skip: Any | None = None,
    total: Any | None = None,
) -> Any:
    """`sgd_step` without synchronization. Returns Σ update² as a float64 device array (1,), `total` if that is given.

    numbers: (1 or more,) float32 on the device, the learning rate first, replacing `rate`. clip: (1,) float32,
    multiplies every gradient. skip: (1,) int32; if nonzero, nothing is written.
    """
    check = Shapes("sgd_step")
    (size,) = check("parameters", parameters, "n")
    check("gradients", gradients, "n")
    check("velocity", velocity, "n")
    blocks = flat_blocks(size)
    moved = launcher.scratch("squares", (blocks,), "float64")
    moved[...] = 0.0  # stays 0 if the step is skipped
    variant, weights = weight_arguments(launcher, "sgd_step", gradients, parameters, copy, rounding)
    arrays = {"gradients": gradients, "velocity": velocity, "clip": clip, "skip": skip, "moved": moved}
    arrays["numbers"] = launcher.on_device("numbers", rate if numbers is None else numbers, "float32")
    scalars = {
        "size": size,
        "decayed": decayed,
        "scale": gradient_scale,
        "momentum": momentum if velocity is not None else 0.0,
        "decay": weight_decay,
        "zero_gradients": 0,
    }
    launcher.launch(variant, "sgd_step", (blocks,), THREADS, arrays | weights | scalars)
    return finish_sum(launcher, variant.storage, moved, total)
