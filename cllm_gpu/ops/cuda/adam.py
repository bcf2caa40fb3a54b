"""Adam and AdamW on flat buffers: launches cuda/adam.cu. As `cllm_gpu.ops.reference.adam`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.optimizer_weights import weight_arguments
from cllm_gpu.ops.cuda.squared_norm import THREADS, finish_sum, flat_blocks
from cllm_gpu.ops.reference.rounding import StochasticRounding


def adam_step(
    launcher: Launcher,
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
    """As the reference; synchronizes with the device."""
    if parameters.size == 0:
        return 0.0
    moved = adam_step_on_device(
        launcher,
        parameters,
        gradients,
        first_moment,
        second_moment,
        rate=rate,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        step=step,
        weight_decay=weight_decay,
        decayed=decayed,
        decoupled=decoupled,
        gradient_scale=gradient_scale,
        copy=copy,
        rounding=rounding,
        measure=True,
    )
    assert moved is not None
    return float(moved[0])


def adam_step_on_device(
    launcher: Launcher,
    parameters: Any,
    gradients: Any,
    first_moment: Any,
    second_moment: Any,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    decayed: int,
    decoupled: bool,
    gradient_scale: float,
    rate: float = 0.0,
    step: int = 1,
    numbers: Any | None = None,
    copy: Any | None = None,
    rounding: StochasticRounding | None = None,
    clip: Any | None = None,
    skip: Any | None = None,
    zero_gradients: bool = False,
    measure: bool = False,
    total: Any | None = None,
) -> Any | None:
    """`adam_step` without synchronization: parameters and moments (n) float32, gradients (n) float32 or bfloat16.

    numbers: (3,) float32 on the device, replacing `rate` and `step`, as `step_decision.decide_step` writes them.
    copy: (n) bfloat16 or of the gradients' dtype, receives the rounded parameters. rounding: if given, the parameters
    themselves are bfloat16. clip: (1,) float32 on the device, multiplies every gradient. skip: (1,) int32 on the
    device; if nonzero, nothing is written. zero_gradients: zero the gradients in the same pass. If `measure`, returns
    Σ update² as a float64 device array (1,), `total` if that is given; else None.
    """
    if numbers is None:
        corrections = 1.0 - beta1**step, 1.0 - beta2**step
        numbers = (rate / corrections[0], 1.0 / corrections[1], rate * weight_decay if decoupled else 0.0)
    blocks = _check(parameters, gradients, first_moment, second_moment)
    variant, weights = weight_arguments(launcher, "adam_step", gradients, parameters, copy, rounding)
    moved = launcher.scratch("squares", (max(1, blocks),), "float64") if measure else None
    if moved is not None:
        moved[...] = 0.0  # stays 0 if the step is skipped
    arrays = {"gradients": gradients, "first_moment": first_moment, "second_moment": second_moment}
    arrays |= {"clip": clip, "skip": skip, "moved": moved}
    arrays["numbers"] = launcher.on_device("numbers", numbers, "float32")
    scalars = {
        "size": parameters.size,
        "decayed": decayed,
        "scale": gradient_scale,
        "beta1": beta1,
        "beta2": beta2,
        "rest1": 1.0 - beta1,
        "rest2": 1.0 - beta2,
        "epsilon": epsilon,
        "coupled_decay": 0.0 if decoupled else weight_decay,
        "zero_gradients": int(zero_gradients),
    }
    launcher.launch(variant, "adam_step", (blocks,), THREADS, arrays | weights | scalars)
    return None if moved is None else finish_sum(launcher, variant.storage, moved, total)


def _check(parameters: Any, gradients: Any, first_moment: Any, second_moment: Any) -> int:
    """Number of blocks of the pass. Raises UserError if the shapes differ."""
    check = Shapes("adam_step")
    (size,) = check("parameters", parameters, "n")
    for name, array in (("gradients", gradients), ("first_moment", first_moment), ("second_moment", second_moment)):
        check(name, array, "n")
    return flat_blocks(size)
