"""A device that times nothing and says it did, for tests of everything around a measurement."""

from __future__ import annotations

from collections.abc import Callable
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
    """As much of cupy as `Card` asks for, on NumPy and a fake clock; `log` keeps what was done, in order."""

    uint8 = np.uint8

    def __init__(self, clock: Clock, log: list[str]) -> None:
        FakeEvent.clock = clock
        self._log = log
        self.RawModule: Any = None
        self.__version__ = "14.2.0"
        properties = {
            "l2CacheSize": 1 << 24, "name": b"NVIDIA Fake", "major": 9, "minor": 0, "multiProcessorCount": 3,
            "totalGlobalMem": 2000,
        }  # fmt: skip
        runtime = _namespace(
            getDeviceProperties=lambda device: properties,
            memGetInfo=lambda: (1000, 2000),
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 12090,
        )
        device = _namespace(id=0, synchronize=lambda: log.append("synchronize"))
        self.cuda = _namespace(
            Event=FakeEvent,
            Device=lambda: device,
            runtime=runtime,
            get_elapsed_time=lambda start, stop: 1e3 * (stop.at - start.at),
        )

    def zeros(self, size: int, dtype: Any) -> Any:
        log = self._log
        return _namespace(size=size, fill=lambda value: log.append("flush"))

    def get_default_memory_pool(self) -> Any:
        return _namespace(free_all_blocks=lambda: self._log.append("free"))

    def RawKernel(self, code: str, name: str) -> Callable[..., None]:  # noqa: N802 (CuPy's name)
        assert name in code
        return lambda grid, block, arguments: self._log.append(name)


class _Namespace:
    def __init__(self, **names: Any) -> None:
        self.__dict__.update(names)


def _namespace(**names: Any) -> Any:
    return _Namespace(**names)
