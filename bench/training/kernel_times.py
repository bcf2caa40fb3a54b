"""Times each kernel of a training step on the GPU with CUDA events around every launch; needs no profiler.

The events have a cost: each takes a timestamp between two kernels, which prevents them from overlapping. Use the times
for the distribution of a step's time over the kernels, and a run without events for its total.
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
WARMUP_STEPS = 2
"""First steps, before which the GPU is not delayed: they compile kernels and measure the host's enqueuing time."""


class Clock:
    """A clock that measures nothing, for rehearsals."""

    def mark(self) -> Any:
        """Record an event in the current stream."""
        return None

    def delay(self, seconds: float) -> None:
        """Delay the GPU, so that the host runs ahead of it."""

    def milliseconds(self, start: Any, stop: Any) -> float | None:
        """Time between two completed events."""
        return None


class CudaClock(Clock):
    """A clock of CUDA events in CuPy's current stream."""

    def __init__(self, cupy: Any) -> None:
        self._cuda = cupy.cuda
        self._delay = cupy.RawKernel(DELAY, "delay")

    def mark(self) -> Any:
        event = self._cuda.Event()
        event.record()
        return event

    def delay(self, seconds: float) -> None:
        self._delay((1,), (1,), (np.uint64(1e9 * seconds),))

    def milliseconds(self, start: Any, stop: Any) -> float | None:
        return float(self._cuda.get_elapsed_time(start, stop))


_Launches = list[tuple[str, Any, Any]]
"""(kernel, start, stop) of the launches of one step, in order."""


class KernelTimes:
    """A `profiling.Watch` that times steps launched kernel by kernel, with no other step in flight.

    The GPU is delayed until the host has enqueued the step, so that no kernel waits for Python. Launches outside a step
    (such as an evaluation) are not timed.
    """

    def __init__(self, clock: Clock, host: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._host = clock, host
        self._steps: list[_Launches] = []
        self._in_step = self._in_launch = False
        self._enqueuing: list[float] = []  # host seconds to enqueue each step

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """The context manager for the range `name`."""
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
            if not launches and len(self._steps) > WARMUP_STEPS:
                # the minimum so far: if the queue is full, the host waits for the GPU and thus for the delay itself
                self._clock.delay(1.5 * min(self._enqueuing) + 1e-4)
            start = self._clock.mark()
            yield
            launches.append((kernel, start, self._clock.mark()))
        finally:
            self._in_launch = False

    def by_class(self) -> dict[str, Measured]:
        """Launches and milliseconds per class of kernel, medians over the steps after the warmup."""
        counts, times = defaultdict(list), defaultdict(list)
        for step in self._steps[WARMUP_STEPS:]:
            found: dict[str, list[float | None]] = defaultdict(list)
            names = classes_of(kernel for kernel, _, _ in step)
            for name, (_, start, stop) in zip(names, step, strict=True):
                found[name].append(self._clock.milliseconds(start, stop))
            for name, parts in found.items():
                counts[name].append(len(parts))
                times[name].append(_sum(parts))
        return {name: Measured(statistics.median(counts[name]), _median(times[name])) for name in counts}

    def whole_step(self) -> float | None:
        """Median time in milliseconds from the start of a step's first kernel to the end of its last."""
        return _median([self._clock.milliseconds(step[0][1], step[-1][2]) for step in self._steps[WARMUP_STEPS:]])


def _sum(parts: list[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None
