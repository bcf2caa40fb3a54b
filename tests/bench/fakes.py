"""A device that times nothing and says it did, for tests of everything around a measurement."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench.kernels.timing import Call, Rehearsal, Timing

MACHINE: dict[str, Any] = {"card": "NVIDIA H200 (not real)", "date": "2031-02-03T04:05:06+00:00"}


class FakeCard(Rehearsal):
    """The simulator's arrays and kernels; every call "takes" what `milliseconds` says."""

    rehearsal = False

    def __init__(self, milliseconds: float = 2.0) -> None:
        super().__init__()
        self._milliseconds = milliseconds

    def time(self, call: Call, prepare: Call = lambda: None) -> Timing | None:
        super().time(call, prepare)
        t = self._milliseconds
        return Timing(t, 0.9 * t, 1.1 * t, 11)


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeEvent:
    """A CUDA event on the fake clock."""

    clock: Clock

    def __init__(self) -> None:
        self.at: float | None = None

    def record(self) -> None:
        self.at = FakeEvent.clock.now


class FakeCupy:
    """As much of cupy as timing a call on a `Card` asks for, on NumPy and a fake clock."""

    uint8 = np.uint8

    def __init__(self, clock: Clock) -> None:
        FakeEvent.clock = clock
        self.RawModule: Any = None
        properties = {"l2CacheSize": 1 << 24, "major": 9, "minor": 0}
        device = SimpleNamespace(id=0, synchronize=lambda: None)
        self.cuda = SimpleNamespace(
            Event=FakeEvent,
            Device=lambda: device,
            runtime=SimpleNamespace(getDeviceProperties=lambda device: properties),
            get_elapsed_time=lambda start, stop: 1e3 * (stop.at - start.at),
        )

    def zeros(self, size: int, dtype: Any) -> Any:
        return SimpleNamespace(fill=lambda value: None)

    def RawKernel(self, code: str, name: str) -> Callable[..., None]:  # noqa: N802 (CuPy's name)
        return lambda grid, block, arguments: None
