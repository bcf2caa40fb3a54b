"""The decisions of a training step on the device: launches cuda/step.cu."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.variant import Variant

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
    moved: Any,
    norms: Any,
    *,
    beta1: float,
    beta2: float,
    decay: float,
    other_rate: float,
    clip_norm: float,
    largest: float,
    limit: float,
    carry: float,
    gain: float,
    amplification: float,
    coupled_decay: float,
    maximum_skipped: int,
    storage: str,
) -> None:
    """Decide whether a step is applied, and compute its clipping factor and the optimizer's multipliers.

    Read: sums (2,) float64, the losses and the squared gradient norm; rate (1,) float64. Counted on: counts (2,) int32,
    updates and skips in a row; norms (2,) float64, bounds on those of the weights and of the first moment. Written:
    numbers (2, 3) float32 for parameters of the rate and of `other_rate` times it, clip (1,) float32, skip (1,) int32,
    draw (1,) uint32, outcome (1,) float64: 0 for a step that is applied. As the step before left them, moved (2,)
    float64, Σ update² of two segments, and outcome are read first: by them the norm of the weights has grown.

    Skipped with outcome 1: where losses or norm are not finite, where the norm after clipping reaches `largest`, and
    after `maximum_skipped` skips in a row, whatever comes. With outcome 2: where what the step computes could reach
    `limit` by `cllm_gpu.optim.bounds`, whose `Growth` the other numbers are. Without bias corrections both betas are 0.
    """
    check = Shapes("decide_step", one=1, two=2, three=NUMBERS)
    for name, array in (("rate", rate), ("clip", clip), ("skip", skip), ("draw", draw), ("outcome", outcome)):
        check(name, array, "one")
    check("sums", sums, "two")
    check("counts", counts, "two")
    check("moved", moved, "two")
    check("norms", norms, "two")
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
            "moved": moved,
            "norms": norms,
            "beta1": beta1,
            "beta2": beta2,
            "decay": decay,
            "other_rate": other_rate,
            "clip_norm": clip_norm,
            "largest": largest,
            "limit": limit,
            "carry": carry,
            "gain": gain,
            "amplification": amplification,
            "coupled_decay": coupled_decay,
            "maximum_skipped": maximum_skipped,
        },
    )
