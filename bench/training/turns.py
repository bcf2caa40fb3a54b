"""Training steps of several contestants in one process, in turns: whatever else the machine does falls on all alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.training.cpu_process import Ours

BatchOf = Callable[[str, int], tuple[Any, Any]]
"""Tokens and targets of a contestant's step, by its name and the step's number."""


def take_turns(
    sides: Mapping[str, Ours], batch_of: BatchOf, rounds: int, *, steps: int = 1, warmup: int = 1
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and processor seconds of the median step of each side.

    In every round each takes so many steps, in every other round in the opposite order. The first `warmup` steps of
    each are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, rounds):  # the first round warms up
        chosen = range(warmup) if number < 0 else range(warmup + number * steps, warmup + (number + 1) * steps)
        for name in list(sides)[:: -1 if number % 2 else 1]:
            for step in chosen:
                tokens, targets = batch_of(name, step)
                start, start_busy = time.perf_counter(), time.process_time()
                sides[name].step(tokens, targets)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
                    busy[name].append(time.process_time() - start_busy)
        print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr)
    wall, processors = ({name: statistics.median(x) for name, x in taken.items()} for taken in (seconds, busy))
    return wall, processors
