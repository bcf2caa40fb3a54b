"""How long each kernel of a training step takes on the card, by CUDA events around every launch: needs no profiler.

Events cost: each takes a time stamp between two kernels, so that the next kernel does not begin while the last one
ends. So the sum over the kernels says where the time of a step goes; how long a step takes, a run without events says.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from bench.kernels.timing import DELAY
from bench.training.roofline import Measured, classes_of
from cllm_gpu.utils.profiling import KERNEL, unwatched

STEP = "step"
"""The range in which the host enqueues a step."""
UNHELD = 2
"""First steps in front of which the card is not held: they compile, and say how long the host takes."""


class Clock:
    """Takes no times: a rehearsal's."""

    def mark(self) -> Any:
        """A moment in the current stream."""
        return None

    def hold(self, seconds: float) -> None:
        """Keep the card busy, so that the host runs ahead of it."""

    def milliseconds(self, start: Any, stop: Any) -> float | None:
        """Between two moments, once both have passed."""
        return None


class CudaClock(Clock):
    """Moments are CUDA events of cupy's current stream."""

    def __init__(self, cupy: Any) -> None:
        self._cuda = cupy.cuda
        self._delay = cupy.RawKernel(DELAY, "delay")

    def mark(self) -> Any:
        event = self._cuda.Event()
        event.record()
        return event

    def hold(self, seconds: float) -> None:
        self._delay((1,), (1,), (np.uint64(1e9 * seconds),))

    def milliseconds(self, start: Any, stop: Any) -> float | None:
        return float(self._cuda.get_elapsed_time(start, stop))


_Launches = list[tuple[str, Any, Any]]
"""Of one step in order: kernel, start, stop."""


class KernelTimes:
    """A `profiling.Watch` over steps that are launched kernel by kernel, each with nothing else under way.

    The card is held back until the host has enqueued the step, so that no kernel waits for Python. What is launched
    outside of a step (an evaluation, say) is not watched.
    """

    def __init__(self, clock: Clock, host: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._host = clock, host
        self._steps: list[_Launches] = []
        self._in_step = self._in_launch = False
        self._enqueuing: list[float] = []  # seconds of the host, of each step

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """The range called `name`."""
        if name == STEP:
            return self._step()
        if self._in_step and name.startswith(KERNEL):
            return self._launch(name.removeprefix(KERNEL))
        return unwatched(name)

    @contextmanager
    def _step(self) -> Iterator[None]:
        self._steps.append([])
        begun, self._in_step = self._host(), True
        try:
            yield
        finally:
            self._in_step = False
            self._enqueuing.append(self._host() - begun)

    @contextmanager
    def _launch(self, kernel: str) -> Iterator[None]:
        if self._in_launch:
            raise RuntimeError(f"{kernel} is launched within another launch and would be counted twice")
        launches, self._in_launch = self._steps[-1], True
        try:
            if not launches and len(self._steps) > UNHELD:
                # the least so far: where the queue is full, the host waits for the card, and for what holds it
                self._clock.hold(1.5 * min(self._enqueuing) + 1e-4)
            start = self._clock.mark()
            yield
            launches.append((kernel, start, self._clock.mark()))
        finally:
            self._in_launch = False

    def by_class(self) -> dict[str, Measured]:
        """Launches and milliseconds of each class of kernel: medians over the steps that the card was held before."""
        counts, times = defaultdict(list), defaultdict(list)
        for step in self._steps[UNHELD:]:
            found: dict[str, list[float | None]] = defaultdict(list)
            names = classes_of(kernel for kernel, _, _ in step)
            for name, (_, start, stop) in zip(names, step, strict=True):
                found[name].append(self._clock.milliseconds(start, stop))
            for name, parts in found.items():
                counts[name].append(len(parts))
                times[name].append(_sum(parts))
        return {name: Measured(statistics.median(counts[name]), _median(times[name])) for name in counts}

    def whole_step(self) -> float | None:
        """Milliseconds from the start of a step's first kernel to the end of its last, the median."""
        return _median([self._clock.milliseconds(step[0][1], step[-1][2]) for step in self._steps[UNHELD:]])


def _sum(parts: list[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None
