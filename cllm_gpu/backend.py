"""Which arrays and which implementation of the operations: chosen once, passed down. The only import of cupy.

numpy      NumPy arrays, the reference operations
native     NumPy arrays, the operations in C++ compiled on this machine
cupy       CuPy arrays on an NVIDIA GPU, the operations as CUDA kernels
simulator  NumPy arrays, the same CUDA kernels run on the CPU by the simulator: slow, for tests
auto       cupy where a GPU and CuPy are there, else native where a C++ compiler is, else numpy
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cllm_gpu.devices import driver
from cllm_gpu.devices.buffers import ALIGNMENT
from cllm_gpu.devices.energy import EnergyMeter, find_meter
from cllm_gpu.devices.host_memory import anonymous_bytes, available_bytes
from cllm_gpu.devices.logit_chunks import ON_CARD, ON_HOST, LogitChunks
from cllm_gpu.devices.peak_flops import Peak, card_peak, measured_peak
from cllm_gpu.ops.precision import PRECISIONS, Precision, storage_dtype
from cllm_gpu.ops.registry import Operations, cuda_operations, native_operations, reference_operations
from cllm_gpu.ops.stream import Device
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.profiling import Ranges
from cllm_gpu.utils.system import usable_cores

CPU_WORKING_BYTES = 3 << 20
"""Seen on Linux with two workers, 2 to 6 MB from tiny to mini: tiles, thread stacks, libraries on their first use."""
CARD_RESERVED = 0.06
"""Share of a card's free memory left to kernels (code, scratch), captured graphs, temporaries of evaluations and gaps
between allocations; the CUDA context has its memory already, and cuBLASLt's workspace is planned."""
LEAST_GENERATION = 8
"""Major compute capability from which tensor cores multiply TF32 and bf16 (CUDA C++ programming guide, 7.24)."""
ENVIRONMENT_VARIABLE = "CLLM_BACKEND"


@dataclass(frozen=True)
class Backend:
    """Arrays, operations and device services. Everything above speaks to these and names no array module."""

    name: str
    xp: Any
    ops: Operations
    description: str
    """One line: what was chosen and why."""
    products: str = "matrix products by NumPy"
    """Who computes matrix products."""
    ranges: Ranges = field(default_factory=Ranges)
    workers: int = 1
    """Parts a batch is split into, each computed by a thread of its own (1 on a GPU)."""
    synchronize: Callable[[], None] = lambda: None
    """Wait until the device has finished; nothing to do on a CPU."""
    working_bytes: int = CPU_WORKING_BYTES
    """What a run takes besides its planned arrays: temporaries of a tile, threads, libraries."""
    logit_chunks: LogitChunks = ON_HOST
    """How many logits a model on this backend holds at a time."""
    memory_held: Callable[[], int | None] = anonymous_bytes
    """Bytes of the device's memory this process holds now; None if the system does not say."""
    memory_free: Callable[[], int | None] = available_bytes
    """Bytes of the device's memory that may still be taken; None if the system does not say."""
    memory_reserved: float = 0.25
    """Share of `memory_free` that a plan made to fill it leaves: on a CPU to other programs."""
    precision: Precision = "fp32"
    """In which numbers a model trains; one that is only read computes in those of its parameters."""
    precisions: tuple[Precision, ...] = ("fp32",)
    """Those that this backend trains in on this machine."""
    device: Device | None = None
    """A stream and operations for steps that run without the host; None on a CPU."""
    peak: Callable[[], Peak] | None = None
    """What the device can do at most in `precision`, perhaps measured; None on a CPU."""
    energy_meter: Callable[[], EnergyMeter | None] | None = None
    """The counter of the energy that the device takes, where it has one; None on a CPU."""

    @property
    def is_card(self) -> bool:
        """Arrays are in the memory of a GPU."""
        return self.xp is not np

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of parameters, activations and gradients in training."""
        return storage_dtype(self.precision)

    def empty_bytes(self, size: int) -> Any:
        """Uninitialised uint8 array (size,) whose first element is aligned to 128 bytes."""
        if self.xp is not np:
            return self.xp.empty(size, dtype=np.uint8)  # CuPy's allocations are 512-byte aligned
        memory = (self.device.stream.empty if self.device else np.empty)(size + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        return memory[start : start + size]

    def zeros(self, size: int, dtype: Any) -> Any:
        """Aligned flat array of zeros."""
        flat = self.empty_bytes(size * np.dtype(dtype).itemsize).view(dtype)
        flat[...] = 0
        return flat

    def asarray(self, x: Any) -> Any:
        """A host array on the device (itself on a CPU)."""
        return self.device.stream.array(x) if self.device else self.xp.asarray(x)

    def to_host(self, x: Any) -> np.ndarray[Any, Any]:
        """A device array as a NumPy array (itself on a CPU)."""
        return np.asarray(x) if self.xp is np else self.xp.asnumpy(x)


def get_backend(name: str | None = None, *, workers: int | None = None, precision: Precision = "fp32") -> Backend:
    """The backend called `name`, or by $CLLM_BACKEND, or "auto". Raises UserError if it is not available.

    `workers`: threads a CPU backend splits a batch over; None means one per core. `precision`: what it trains in.
    """
    chosen = name or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if chosen not in NAMES:
        raise UserError(f"backend {chosen!r} is not known; choose one of {', '.join(NAMES)}")
    _require_precision(chosen, precision)
    return _automatic(workers, precision) if chosen == "auto" else BACKENDS[chosen].make(workers, precision)


def _require_precision(name: str, precision: Precision) -> None:
    """UserError for a precision that the backend called `name` does not train in on any machine."""
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is not known; choose one of {', '.join(PRECISIONS)}")
    if name != "auto" and precision not in BACKENDS[name].trains_in:
        others = " or ".join(sorted(other for other, kind in BACKENDS.items() if precision in kind.trains_in))
        raise UserError(f"backend {name} does not train in {precision}: choose {others}, or fp32")


def _automatic(workers: int | None, precision: Precision) -> Backend:
    """The fastest backend this machine has; its description says what was taken and why."""
    obstacle = driver.missing(driver.find_driver(), has_cupy=driver.has_cupy())
    if obstacle is None:
        try:
            return _cupy_backend("an NVIDIA GPU and CuPy are here", precision)
        except UserError as error:
            obstacle = str(error)
    if precision != "fp32":  # on a CPU it is slower than fp32, so auto does not fall back to it
        otherwise = ", or slowly with backend numpy" if precision == "bf16" else ""
        raise UserError(
            f"precision {precision} is for a GPU, and there is none to use ({obstacle}): train in fp32{otherwise}"
        )
    try:
        return _native_backend(workers, obstacle)
    except UserError as error:
        return _numpy_backend(workers, f"numpy: NumPy reference operations ({obstacle}; {error})")


def _cupy_backend(reason: str, precision: Precision = "fp32") -> Backend:
    obstacle = driver.missing(driver.find_driver(), has_cupy=driver.has_cupy())
    if obstacle is not None:
        raise UserError(f"backend cupy is not available: {obstacle}")
    try:
        cupy = importlib.import_module("cupy")
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        device, generation = properties["name"].decode(), properties["major"]
    except Exception as error:  # CuPy raises its own kinds: a broken install, a driver that is too old, no permission
        raise UserError(f"backend cupy is not available: {type(error).__name__}: {error}") from error
    precisions = BACKENDS["cupy"].trains_in if generation >= LEAST_GENERATION else ("fp32",)
    if precision not in precisions:
        raise UserError(f"{device} has no tensor cores for {precision} (Ampere and newer have): train in fp32")
    from cllm_gpu.ops.cuda.cublaslt import WORKSPACE_BYTES
    from cllm_gpu.ops.cuda.cupy_launcher import gpu_launcher
    from cllm_gpu.ops.cuda.device import cuda_device
    from cllm_gpu.ops.cuda.stream import CudaStream

    ranges = Ranges()
    launcher, products = gpu_launcher(cupy, tf32=precision == "tf32", watched=ranges.kernel)
    ops = cuda_operations(launcher, ranges)
    return Backend(
        "cupy",
        cupy,
        ops,
        f"cupy: CUDA kernels on {device} ({reason})",
        products,
        precision=precision,
        precisions=precisions,
        ranges=ranges,
        synchronize=lambda: cupy.cuda.get_current_stream().synchronize(),
        working_bytes=CPU_WORKING_BYTES + (WORKSPACE_BYTES if launcher.lt is not None else 0),
        logit_chunks=ON_CARD,
        memory_held=cupy.get_default_memory_pool().total_bytes,
        memory_free=lambda: cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes(),
        memory_reserved=CARD_RESERVED,
        device=cuda_device(launcher, CudaStream(cupy), "captured as a CUDA graph"),
        peak=lambda: _cupy_peak(cupy, ops, precision),
        energy_meter=lambda: find_meter(cupy.cuda.Device().id),
    )


def _cupy_peak(cupy: Any, ops: Operations, precision: Precision) -> Peak:
    device = cupy.cuda.Device()
    peak = card_peak(cupy.cuda.runtime, device.id, precision)
    if peak is not None:
        return peak
    peak = measured_peak(lambda x, w, out: ops.linear_forward(x, w, None, out), cupy, precision, device.synchronize)
    cupy.get_default_memory_pool().free_all_blocks()
    return peak


def _simulator_backend(precision: Precision) -> Backend:
    from cllm_gpu import simulator  # only here, as above
    from cllm_gpu.ops.cuda.device import cuda_device
    from cllm_gpu.ops.cuda.launcher import Launcher
    from cllm_gpu.simulator import graphs
    from cllm_gpu.simulator.stream import SimulatedStream
    from cllm_gpu.utils.compiler import require_compiler

    require_compiler()
    ranges = Ranges()
    launcher = Launcher(
        np, simulator.RawModule, empty=graphs.empty, library_call=graphs.library_call, watched=ranges.kernel
    )
    ops = cuda_operations(launcher, ranges)
    device = cuda_device(launcher, SimulatedStream(), "recorded and replayed by the simulator")
    description = "simulator: CUDA kernels run on the CPU, as asked"
    can = BACKENDS["simulator"].trains_in
    return Backend("simulator", np, ops, description, precision=precision, precisions=can, ranges=ranges, device=device)


def _native_backend(workers: int | None, reason: str) -> Backend:
    from cllm_gpu.ops.native.library import load_library  # only here: other backends need none of it

    library = load_library()
    ops = native_operations(library)
    description = f"native: C++ operations, {library.products} ({reason})"
    return Backend("native", np, ops, description, library.products, workers=workers or usable_cores())


def _numpy_backend(workers: int | None, description: str, precision: Precision = "fp32") -> Backend:
    ops = reference_operations(np, bfloat16=precision == "bf16")
    threads, can = workers or usable_cores(), BACKENDS["numpy"].trains_in
    return Backend("numpy", np, ops, description, workers=threads, precision=precision, precisions=can)


@dataclass(frozen=True)
class BackendKind:
    """What is known of a backend before it is made."""

    make: Callable[[int | None, Precision], Backend]
    """The backend with this many workers (None: one per core), training in a precision of `trains_in`."""
    trains_in: tuple[Precision, ...]
    """Precisions that it trains in on some machine."""
    has_float64: bool = False
    """Its operations take float64 too, as the gradient check needs."""


BACKENDS = {
    "numpy": BackendKind(
        lambda workers, precision: _numpy_backend(workers, "numpy: NumPy reference operations, as asked", precision),
        ("fp32", "bf16"),
        has_float64=True,
    ),
    "native": BackendKind(lambda workers, _: _native_backend(workers, "as asked"), ("fp32",), has_float64=True),
    "cupy": BackendKind(lambda _, precision: _cupy_backend("as asked", precision), ("fp32", "tf32", "bf16")),
    "simulator": BackendKind(lambda _, precision: _simulator_backend(precision), ("fp32", "bf16")),
}
NAMES = ("auto", *BACKENDS)
