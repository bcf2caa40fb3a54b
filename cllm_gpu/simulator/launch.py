"""Loads a compiled CUDA source and runs launches of its kernels."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cllm_gpu.simulator import arguments as kernel_arguments
from cllm_gpu.simulator import guarded, pauses, symbols, traffic
from cllm_gpu.simulator.arguments import Parameter
from cllm_gpu.simulator.errors import KernelError
from cllm_gpu.simulator.structures import KernelTable, LaunchRequest, RangeEntry, TrafficEntry, VariableEntry
from cllm_gpu.utils.errors import UserError

MAXIMUM_THREADS = 1024
STACK_BYTES = 256 * 1024
"""Address space of one simulated thread's stack; pages are taken only when touched."""
STATIC_SHARED_LIMIT = 48 * 1024
_TRAFFIC_LINES = 4096
_PAUSED = 2
"""Of sim_launch and sim_continue."""
_ONE_LAUNCH = threading.Lock()
"""Launches of all libraries share the stacks, and a crash handler belongs to the process."""


@dataclass(frozen=True)
class Schedule:
    """The order in which the threads of a launch run; the result of a correct kernel does not depend on it."""

    seed: int = 0
    """0: warps and lanes in order. Otherwise the order is drawn from this seed."""
    lazy_copies: bool = True
    """True: cp.async copies at the wait (reveals a missing wait). False: at issue (reveals an early overwrite)."""


@dataclass(frozen=True)
class Launch:
    """The configuration of one launch."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: Sequence[Any]
    shared_bytes: int
    schedule: Schedule
    count_traffic: bool
    seconds: float
    """Most processor time; 0: without a limit."""


class Library:
    """A compiled CUDA source, loaded."""

    _stacks: int | None = None

    def __init__(self, path: Path, checked: bool, variables: Sequence[str] = ()) -> None:
        self.path, self.checked = path, checked
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise UserError(f"the compiled library {path} does not load: {error}") from error
        self.variables = {name: self._variable(i) for i, name in enumerate(variables)}
        """Name of each __device__ or __constant__ variable → its bytes."""
        self._library.sim_launch.argtypes = [ctypes.POINTER(LaunchRequest)]

    def kernel(self, index: int) -> Any:
        """The table entry number `index`."""
        function = getattr(self._library, f"sim_kernel_{index}")
        function.restype = ctypes.POINTER(KernelTable)
        return function()

    def _variable(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        function = getattr(self._library, f"sim_variable_{index}")
        function.restype = VariableEntry
        entry = function()
        return np.ctypeslib.as_array((ctypes.c_uint8 * entry.bytes).from_address(entry.address))

    def stacks(self) -> int:
        """Address of the stacks of MAXIMUM_THREADS threads, shared by all libraries of the process."""
        if Library._stacks is None:
            allocate = self._library.sim_allocate_stacks
            allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_uint64, ctypes.c_uint64]
            Library._stacks = allocate(MAXIMUM_THREADS, STACK_BYTES)
            if Library._stacks is None:
                raise UserError("the simulator cannot reserve address space for its threads' stacks")
        return Library._stacks

    def run(self, request: LaunchRequest, seconds: float) -> bool:
        """Run a launch. Returns True if it completed, False if it stopped at an error or at the time limit.

        The launch is paused several times a second, so that Python handles signals (Ctrl-C) meanwhile.
        """
        with _ONE_LAUNCH, pauses.paused_regularly():
            started = time.thread_time()
            status = self._library.sim_launch(ctypes.byref(request))
            while status == _PAUSED:
                if seconds and time.thread_time() - started > seconds:
                    request.fault_kind, request.fault_message = b"time limit", _past_limit(seconds)
                    return False
                status = self._library.sim_continue()
            return status == 0


class Function:
    """One kernel of a library, ready to be launched."""

    def __init__(self, library: Library, index: int, name: str, parameter_names: Sequence[str]) -> None:
        self.library, self.name = library, name
        self._table = library.kernel(index)
        self.parameters = _describe(self._table.contents, parameter_names)

    def run(self, launch: Launch) -> traffic.Traffic | None:
        """Run one launch. Returns its traffic if counted, else None. Raises KernelError for the first error found."""
        packed = kernel_arguments.pack(self.name, self.parameters, launch.arguments)
        if not self.library.checked:
            self._run(launch, packed, [])
            return None
        passed = list(kernel_arguments.arrays_in(self.parameters, launch.arguments))
        spans = guarded.spans_of([(one.name, one.array) for one in passed])
        for one in passed:
            address = bytes(ctypes.c_void_p(guarded.address_in(spans, one.array)))
            before, after = packed[one.argument][: one.offset], packed[one.argument][one.offset + len(address) :]
            packed[one.argument] = before + address + after
        found = self._run(launch, packed, spans)
        for span in spans:
            span.write_back()
        return found

    def _run(self, launch: Launch, packed: Sequence[bytes], spans: Sequence[guarded.Span]) -> traffic.Traffic | None:
        buffers = [ctypes.create_string_buffer(value, max(len(value), 1)) for value in packed]
        pointers = (ctypes.c_void_p * max(len(buffers), 1))(*(ctypes.addressof(b) for b in buffers))
        entries = [RangeEntry(s.address, s.address + s.high - s.low, s.name.encode(), s.item_bytes) for s in spans]
        if self.library.checked:
            entries += [_range_of(name, memory) for name, memory in self.library.variables.items()]
        ranges = (RangeEntry * max(len(entries), 1))(*entries)
        counted = (TrafficEntry * (_TRAFFIC_LINES if launch.count_traffic else 1))()
        request = LaunchRequest(
            kernel=self._table,
            arguments=pointers,
            shared_bytes=launch.shared_bytes,
            static_limit=STATIC_SHARED_LIMIT,
            seed=launch.schedule.seed,
            lazy_copies=launch.schedule.lazy_copies,
            count_traffic=launch.count_traffic,
            stacks=self.library.stacks(),
            stack_bytes=STACK_BYTES,
            ranges=ranges,
            range_count=len(entries),
            traffic=counted,
            traffic_capacity=len(counted),
        )
        request.grid[:], request.block[:] = launch.grid, launch.block
        if not self.library.run(request, launch.seconds):
            raise self._error(request)
        return self._traffic(request) if launch.count_traffic else None

    def _error(self, request: LaunchRequest) -> KernelError:
        kind = request.fault_kind.decode()
        where = self._places(request.fault_address_in_code, request.fault_file, request.fault_line)
        other = self._places(request.other_address_in_code, b"", request.other_line)
        if kind == "time limit":  # the same place, by what the kernel called last
            exact = self._places(request.fault_address_in_code, b"", 0)
            where, other = exact or other or where, ()
        block, thread = _three(request.fault_block), _three(request.fault_thread)
        earlier = f"; the earlier access is in {other[0]}" if other else ""
        place = ", called from ".join(map(str, where)) + ", " * bool(where)
        text = f"kernel {self.name}, {place}block {block}, thread {thread}: {kind}: "
        own = [p.line for p in where if p.is_kernel_source] or [p.line for p in where] or [0]
        return KernelError(text + request.fault_message.decode() + earlier, kind, own[0], block, thread)

    def _places(self, address: int, file: bytes, line: int) -> tuple[symbols.Place, ...]:
        if address and (found := symbols.places(self.library.path, address)):
            return found
        return (symbols.place(file.decode(), line),) if line else ()

    def _traffic(self, request: LaunchRequest) -> traffic.Traffic:
        found = []
        for i in range(request.traffic_count):
            entry = request.traffic[i]
            places = self._places(entry.code, entry.file or b"", entry.line)
            where = places[0] if places else symbols.Place(0)
            found.append(traffic.LineTraffic(where, bool(entry.shared), entry.instructions, entry.passes, entry.ideal))
        return traffic.merge(found)


def _past_limit(seconds: float) -> bytes:
    return (
        f"runs for more than {seconds:g} s of processor time; for more, set $CLLM_SIMULATOR_SECONDS (0: no limit)"
    ).encode()


def _range_of(name: str, memory: np.ndarray[Any, Any]) -> RangeEntry:
    low = memory.ctypes.data
    return RangeEntry(low, low + memory.nbytes, name.encode(), 1 if memory.nbytes % 4 or low % 4 else 4)


def _three(values: Any) -> tuple[int, int, int]:
    return values[0], values[1], values[2]


def _describe(table: Any, names: Sequence[str]) -> tuple[Parameter, ...]:
    """The kernel's parameters from the compiler's table, with the names from its source."""
    described = []
    for i in range(table.count):
        entry = table.parameters[i]
        name = names[i] if i < len(names) else f"argument {i + 1}"
        kinds = entry.kind.decode(), entry.pointee_kind.decode()
        described.append(Parameter(name, kinds[0], entry.size, kinds[1], entry.pointee_size, bool(entry.is_const)))
    return tuple(described)
