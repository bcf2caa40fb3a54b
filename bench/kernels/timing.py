"""Times calls on a GPU with CUDA events; in a rehearsal, runs each call once on the simulator without timing it.

Each timed call starts with a cold L2 cache, after a delay kernel that keeps the GPU busy while the host enqueues the
call: the time is that of the work on the GPU, without Python. The result is the median of many calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.kernels.cases import DTYPES
from cllm_gpu.ops.cuda.cupy_launcher import gpu_launcher
from cllm_gpu.ops.cuda.launcher import Launcher

Call = Callable[[], Any]
LEAST_REPEATS, MOST_REPEATS = 11, 201
BLOCK = 1 << 22
DELAY = r"""
extern "C" __global__ void delay(unsigned long long nanoseconds) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}
"""


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: the median, the quartiles, and the number of calls."""

    median: float
    lower: float
    upper: float
    repeats: int


def summarize(milliseconds: list[float]) -> Timing:
    """Median and quartiles.

    >>> summarize([4.0, 1.0, 2.0, 3.0, 100.0]).median
    3.0
    """
    if len(milliseconds) < 2:
        raise ValueError("a median of fewer than two calls says nothing")
    lower, median, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Timing(median, lower, upper, len(milliseconds))


def _nothing() -> None:
    pass


class Device:
    """Arrays, launchers and random data, on a GPU or in a rehearsal."""

    rehearsal = False
    products = "matrix products by NumPy"
    """Implementation of the matrix products."""

    def __init__(self, xp: Any, module_class: Any, launcher: Launcher | None = None) -> None:
        self.xp = xp
        self.separate = Launcher(xp, module_class)
        """A launcher that never fuses epilogues into matrix products."""
        self.launcher = launcher or self.separate
        self._blocks: dict[int, Any] = {}

    def random(self, shape: tuple[int, ...], storage: str, seed: int = 0) -> Any:
        """Normally distributed random numbers; a block of 4 million elements is repeated in larger arrays."""
        if seed not in self._blocks:
            self._blocks[seed] = self.xp.asarray(np.random.default_rng(seed).standard_normal(BLOCK, np.float32))
        block = self._blocks[seed].astype(DTYPES[storage])
        flat = self.xp.empty(int(np.prod(shape)), dtype=DTYPES[storage])
        for start in range(0, flat.size, BLOCK):
            part = flat[start : start + BLOCK]
            part[...] = block[: part.size]
        return flat.reshape(shape)

    def empty(self, shape: tuple[int, ...], storage: str) -> Any:
        """An uninitialised array."""
        return self.xp.empty(shape, dtype=DTYPES[storage])

    def free_bytes(self) -> int:
        """Free memory in bytes."""
        raise NotImplementedError

    def refused(self) -> list[str]:
        """Messages on matrix products for which cuBLASLt has no algorithm, which were measured without it."""
        lt = self.launcher.lt
        return [] if lt is None else [f"cuBLASLt refuses {problem}: {why}" for problem, why in lt.refused.items()]

    def release(self) -> None:
        """Return the memory of freed arrays to the GPU."""

    def time(self, call: Call, prepare: Call = _nothing) -> Timing | None:
        """Time `call`; `prepare` is called before each call, untimed. None in a rehearsal."""
        raise NotImplementedError


class Rehearsal(Device):
    """The simulator: every call runs once, to test the whole program without timing."""

    rehearsal = True

    def __init__(self) -> None:
        from cllm_gpu.simulator import RawModule
        from cllm_gpu.utils.compiler import require_compiler

        require_compiler()
        super().__init__(np, RawModule)

    def free_bytes(self) -> int:
        return 1 << 28

    def time(self, call: Call, prepare: Call = _nothing) -> Timing | None:
        prepare()
        call()
        return None


class Card(Device):
    """The current NVIDIA GPU, through CuPy. seconds: duration of one measurement."""

    def __init__(self, cupy: Any, *, seconds: float = 0.4) -> None:
        launcher, self.products = gpu_launcher(cupy)
        super().__init__(cupy, cupy.RawModule, launcher)
        self._seconds = seconds
        self._delay = cupy.RawKernel(DELAY, "delay")
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        self._flush = cupy.zeros(4 * max(properties["l2CacheSize"], 1 << 24), dtype=cupy.uint8)

    def free_bytes(self) -> int:
        self.release()
        return int(self.xp.cuda.runtime.memGetInfo()[0])

    def release(self) -> None:
        self.xp.get_default_memory_pool().free_all_blocks()

    def time(self, call: Call, prepare: Call = _nothing) -> Timing | None:
        """Median over as many calls as `seconds` allow, 11 to 201."""
        host, whole = self._once(call, prepare)
        repeats = min(MOST_REPEATS, max(LEAST_REPEATS, int(self._seconds / whole)))
        events = [(self.xp.cuda.Event(), self.xp.cuda.Event()) for _ in range(repeats)]
        for start, stop in events:
            prepare()
            self._enqueue(call, start, stop, host)
        self.synchronize()
        return summarize([self.xp.cuda.get_elapsed_time(start, stop) for start, stop in events])

    def synchronize(self) -> None:
        """Wait for the GPU."""
        self.xp.cuda.Device().synchronize()

    def _enqueue(self, call: Call, start: Any, stop: Any, host_seconds: float) -> None:
        self._flush.fill(1)
        self._delay((1,), (1,), (np.uint64(1.5e9 * host_seconds + 50_000),))
        start.record()
        call()
        stop.record()

    def _once(self, call: Call, prepare: Call) -> tuple[float, float]:
        """(host seconds to enqueue a call, seconds of a whole repetition), after warmup calls."""
        for _ in range(3):
            prepare()
            call()
        self.synchronize()
        prepare()
        self.synchronize()
        begun = time.perf_counter()
        call()
        host = time.perf_counter() - begun
        self.synchronize()
        begun = time.perf_counter()
        prepare()
        self._enqueue(call, self.xp.cuda.Event(), self.xp.cuda.Event(), host)
        self.synchronize()
        return host, time.perf_counter() - begun
