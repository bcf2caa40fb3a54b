"""The decisions of a training step on the device: launches cuda/step.cu."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.launcher import Launcher, Shapes, Variant

THREADS = 256  # STEP_THREADS in step.cu
NUMBERS = 3
"""float32 values per row of `numbers`: step size, inverse second bias correction, decoupled weight decay."""


def add_losses(launcher: Launcher, losses: Any, sums: Any, *, accumulate: bool, storage: str) -> None:
    """sums[0] = Σ losses (n,) float32, summed in float64 in a fixed order; added to if `accumulate`.

    storage: dtype name of the run's activations, for which its kernels are compiled.
    """
    check = Shapes("add_losses", S=2)
    (count,) = check("losses", losses, "N")
    check("sums", sums, "S")
    arguments = {"losses": losses, "sums": sums, "count": count, "accumulate": int(accumulate)}
    launcher.launch(Variant("step.cu", storage), "add_losses", (1,), THREADS, arguments)


def decide_step(
    launcher: Launcher,
    sums: Any,
    rate: Any,
    counts: Any,
    numbers: Any,
    clip: Any,
    skip: Any,
    draw: Any,
    outcome: Any,
    *,
    beta1: float,
    beta2: float,
    decay: float,
    other_rate: float,
    clip_norm: float,
    largest: float,
    maximum_skipped: int,
    storage: str,
) -> None:
    """Decide whether a step is applied, and compute its clipping factor and the optimizer's multipliers.

    Inputs: sums (2,) float64, the losses and the squared gradient norm; rate (1,) float64. Updated: counts (2,) int32,
    updates and skips in a row. Outputs: numbers (2, 3) float32, for parameters with learning rate `rate` and with
    `other_rate` times it; clip (1,) float32; skip (1,) int32; draw (1,) uint32; outcome (1,) float64, 1 for a skipped
    step, else 0.

    A step is skipped if the losses or the norm are not finite, if the norm after clipping reaches `largest`, and always
    after `maximum_skipped` skips in a row. Without bias corrections both betas are 0.
    """
    check = Shapes("decide_step", one=1, two=2, three=NUMBERS)
    for name, array in (("rate", rate), ("clip", clip), ("skip", skip), ("draw", draw), ("outcome", outcome)):
        check(name, array, "one")
    check("sums", sums, "two")
    check("counts", counts, "two")
    check("numbers", numbers, "two three")
    launcher.launch(
        Variant("step.cu", storage),
        "decide_step",
        (1,),
        1,
        {
            "sums": sums,
            "rate": rate,
            "counts": counts,
            "numbers": numbers,
            "clip": clip,
            "skip": skip,
            "draw": draw,
            "outcome": outcome,
            "beta1": beta1,
            "beta2": beta2,
            "decay": decay,
            "other_rate": other_rate,
            "clip_norm": clip_norm,
            "largest": largest,
            "maximum_skipped": maximum_skipped,
        },
    )
