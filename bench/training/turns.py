"""Times training steps of several models, alternating in one process so that other load affects all of them equally."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.training.cpu_process import Ours

BatchOf = Callable[[str, int], tuple[Any, Any]]
"""(name, step number) → tokens and targets of that step."""


def take_turns(
    sides: Mapping[str, Ours], batch_of: BatchOf, rounds: int, *, steps: int = 1, warmup: int = 1
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and processor seconds of a step of each side.

    In each round every side takes `steps` steps, with the order reversed in every other round. The first `warmup` steps
    of each side are not counted.
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
