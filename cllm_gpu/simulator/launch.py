"""Loads a compiled CUDA source and runs launches of its kernels."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cllm_gpu.errors import UserError
from cllm_gpu.simulator import arguments as kernel_arguments
from cllm_gpu.simulator.arguments import Parameter

MAXIMUM_THREADS = 1024
STACK_BYTES = 256 * 1024
"""Address space of one simulated thread's stack; pages are taken only when touched."""


class KernelFault(UserError):
    """A kernel did what CUDA forbids. One line: the kernel, what, the source line, block and thread."""

    def __init__(self, message: str, kind: str, line: int) -> None:
        super().__init__(message)
        self.kind = kind
        """What was found: "out of range", "race", "divergence", …"""
        self.line = line
        """Line in the kernel's source, 0 where unknown."""


class _Parameter(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_char),
        ("pointee_kind", ctypes.c_char),
        ("size", ctypes.c_int),
        ("pointee_size", ctypes.c_int),
        ("is_const", ctypes.c_int),
    )


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("invoke", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("count", ctypes.c_int),
    )


class _Range(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("item_bytes", ctypes.c_int),
    )


class _Launch(ctypes.Structure):
    """struct Launch of runtime/runtime.hpp, field by field."""

    _fields_ = (
        ("kernel", ctypes.POINTER(_Kernel)),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("static_limit", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("lazy_copies", ctypes.c_int32),
        ("check", ctypes.c_int32),
        ("stacks", ctypes.c_void_p),
        ("stack_bytes", ctypes.c_uint64),
        ("ranges", ctypes.POINTER(_Range)),
        ("range_count", ctypes.c_int64),
        ("static_shared", ctypes.c_uint64),
        ("fault_block", ctypes.c_uint * 3),
        ("fault_thread", ctypes.c_uint * 3),
        ("fault_address_in_code", ctypes.c_uint64),
        ("other_address_in_code", ctypes.c_uint64),
        ("fault_line", ctypes.c_int32),
        ("has_thread", ctypes.c_int32),
        ("fault_kind", ctypes.c_char * 32),
        ("fault_file", ctypes.c_char * 512),
        ("fault_message", ctypes.c_char * 1024),
    )


@dataclass(frozen=True)
class Schedule:
    """In what order a launch's threads take turns; the result of a right kernel does not depend on it."""

    seed: int = 0
    """0: warps and lanes in order. Otherwise the order is drawn from this seed."""
    lazy_copies: bool = True
    """cp.async copies at the wait (shows a missing wait) rather than at the issue (shows an early overwrite)."""


class Library:
    """A compiled CUDA source, loaded."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.sim_launch.argtypes = [ctypes.POINTER(_Launch)]

    def kernel(self, index: int) -> Any:
        """The table entry number `index`."""
        function = getattr(self._library, f"sim_kernel_{index}")
        function.restype = ctypes.POINTER(_Kernel)
        return function()

    @functools.cached_property
    def stacks(self) -> int:
        """Address of the stacks of MAXIMUM_THREADS threads, shared by all libraries of the process."""
        global _stacks
        if _stacks is None:
            allocate = self._library.sim_allocate_stacks
            allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_uint64, ctypes.c_uint64]
            _stacks = allocate(MAXIMUM_THREADS, STACK_BYTES)
            if _stacks is None:
                raise UserError("the simulator cannot reserve address space for its threads' stacks")
        return _stacks

    def run(self, request: _Launch) -> bool:
        """True when the launch came to its end."""
        return self._library.sim_launch(ctypes.byref(request)) == 0


_stacks: int | None = None


def parameters_of(kernel: Any, names: Sequence[str]) -> tuple[Parameter, ...]:
    """The kernel's parameters from the compiler's table, with the names from its source."""
    table = kernel.contents
    described = []
    for i in range(table.count):
        entry = table.parameters[i]
        name = names[i] if i < len(names) else f"argument {i + 1}"
        kinds = entry.kind.decode(), entry.pointee_kind.decode()
        described.append(Parameter(name, kinds[0], entry.size, kinds[1], entry.pointee_size, bool(entry.is_const)))
    return tuple(described)


def run(
    library: Library,
    kernel: Any,
    name: str,
    parameters: Sequence[Parameter],
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Any],
    shared_mem: int,
    schedule: Schedule,
) -> None:
    """Run one launch to its end. Raises KernelFault with the first finding."""
    packed = kernel_arguments.pack(name, parameters, arguments)
    buffers = [ctypes.create_string_buffer(value, max(len(value), 1)) for value in packed]
    pointers = (ctypes.c_void_p * max(len(buffers), 1))(*(ctypes.addressof(b) for b in buffers))
    request = _Launch(kernel=kernel, arguments=pointers, shared_bytes=shared_mem, static_limit=48 * 1024)
    request.grid[:], request.block[:] = tuple(grid), tuple(block)
    request.seed, request.lazy_copies = schedule.seed, schedule.lazy_copies
    request.stacks, request.stack_bytes = library.stacks, STACK_BYTES
    if not library.run(request):
        raise _fault(name, request)


def _fault(name: str, request: _Launch) -> KernelFault:
    kind, line = request.fault_kind.decode(), request.fault_line
    where = f"line {line}, " if line else ""
    place = f"block {tuple(request.fault_block)}, thread {tuple(request.fault_thread)}"
    return KernelFault(f"kernel {name}: {kind}: {request.fault_message.decode()} ({where}{place})", kind, line)


def as_dimensions(what: str, value: Any, limits: tuple[int, int, int]) -> tuple[int, int, int]:
    """A grid or block size as three numbers. Raises UserError where CUDA would refuse the launch."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not 1 <= len(sizes) <= 3 or not all(isinstance(n, (int, np.integer)) for n in sizes):
        raise UserError(f"{what} must be a tuple of one to three integers, not {value!r}")
    x, y, z = (*map(int, sizes), 1, 1)[:3]
    for axis, size, limit in zip("xyz", (x, y, z), limits, strict=True):
        if not 1 <= size <= limit:
            raise UserError(f"{what} {value!r}: {axis} must be from 1 to {limit}")
    return x, y, z
