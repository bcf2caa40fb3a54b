"""The learning rate of every step: a linear warmup, then a shape over the steps that remain.

A pure function of the step, so a resumed run needs no state. With i the steps since the warmup and n how many there
are, progress i/n runs from 0 at the first step after the warmup towards 1, which only the step after the last would
reach: with a minimum rate of 0 no step is wasted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from cllm_gpu.config import ScheduleConfig


def rate_at(schedule: ScheduleConfig, peak: float, steps: int, step: int) -> float:
    """Rate of 0-based `step` of `steps`, at most `peak`.

    Warmup: step s gets peak·(s + 1)/warmup_steps, so no step has rate 0 and step warmup_steps − 1 has the peak. After
    it the rate is never below `schedule.minimum_rate`; steps past the last keep the rate of the end.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    return max(_SHAPES[schedule.name](schedule, peak, steps, step), schedule.minimum_rate)


def _constant(schedule: ScheduleConfig, peak: float, steps: int, step: int) -> float:
    """The peak rate throughout."""
    return peak


def _linear(schedule: ScheduleConfig, peak: float, steps: int, step: int) -> float:
    """peak − (peak − minimum)·progress."""
    progress = _progress(step, schedule.warmup_steps, steps)
    return peak + (schedule.minimum_rate - peak) * progress


def _cosine(schedule: ScheduleConfig, peak: float, steps: int, step: int) -> float:
    """minimum + (peak − minimum)·½(1 + cos(π·progress)) (Loshchilov & Hutter 2017, "SGDR", one period)."""
    progress = _progress(step, schedule.warmup_steps, steps)
    low = schedule.minimum_rate
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _step(schedule: ScheduleConfig, peak: float, steps: int, step: int) -> float:
    """peak·factor^⌊i/step_every⌋."""
    drops: int = (step - schedule.warmup_steps) // schedule.step_every
    return peak * schedule.step_factor**drops


def _wsd(schedule: ScheduleConfig, peak: float, steps: int, step: int) -> float:
    """Warmup, stable, decay (Hu et al. 2024, "MiniCPM"): the peak, then linearly to the minimum.

    The decay takes decay_fraction of all the steps, the warmup's included, and never starts before the warmup's end.
    """
    start = max(schedule.warmup_steps, steps - round(schedule.decay_fraction * steps))
    progress = _progress(step, start, steps)
    return peak + (schedule.minimum_rate - peak) * progress


def _progress(step: int, start: int, end: int) -> float:
    """How far `step` is on the way from `start` (0) to `end` (1)."""
    if step < start:
        return 0.0
    return 1.0 if step >= end else (step - start) / (end - start)


_SHAPES: dict[str, Callable[[ScheduleConfig, float, int, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "step": _step,
    "wsd": _wsd,
}
