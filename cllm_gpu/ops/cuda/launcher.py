"""Compiles the CUDA sources at first use and launches their kernels with checked, typed arguments.

The same code drives an NVIDIA GPU (CuPy arrays, cupy.RawModule) and the simulator (NumPy arrays, its RawModule). What
a kernel takes is read from its source, so the table cannot differ from it: pointers by dtype, scalars by C type. The
fields of a struct that a kernel takes by value are given and checked like parameters, and packed here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cllm_gpu.ops.cuda.checks import address_of
from cllm_gpu.ops.cuda.kernel_source import kernel_parameters, load_source
from cllm_gpu.ops.cuda.params_struct import Field
from cllm_gpu.ops.cuda.variant import DTYPES, SCALARS, Variant
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.profiling import Watch, unwatched
from cllm_gpu.utils.struct_argument import Pointer, StructArgument

if TYPE_CHECKING:
    from cllm_gpu.ops.cuda.cublaslt import CublasLt

MAXIMUM_GRID = (2**31 - 1, 65535, 65535)
"""Largest grid, in blocks along each axis (CUDA C++ programming guide, 16.2)."""
MAXIMUM_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory available to a kernel without opt-in (CUDA C++ programming guide, 16.4)."""


@dataclass(frozen=True)
class _Plan:
    """How one kernel of a variant is given its arguments."""

    fields: Mapping[str, tuple[Field, Any]]
    """Each with the dtype behind the pointer, or the NumPy scalar type, in the order of the source."""
    layout: struct.Struct | None
    """Of the struct that they are packed into; None if the kernel takes them one by one."""
    offsets: tuple[int, ...]
    """Of each in the struct."""

    def pack(self, values: Iterable[Any]) -> tuple[Any, ...]:
        """The kernel's arguments from checked arrays (None: a null pointer) and scalars, in the order of `fields`."""
        if self.layout is None:
            return tuple(values)
        numbers, pointers = [], []
        for (name, (field, _)), offset, value in zip(self.fields.items(), self.offsets, values, strict=True):
            if not field.pointer:
                numbers.append(value)
            elif value is None:
                numbers.append(0)
            else:
                numbers.append(address_of(value))
                pointers.append(Pointer(name, offset, value))
        return (StructArgument.of(self.layout.pack(*numbers), pointers),)


class Launcher:
    """Launches kernels on arrays of module `xp`, compiled by `module_class` (with the interface of cupy.RawModule)."""

    def __init__(
        self,
        xp: Any,
        module_class: Any,
        *,
        tf32: bool = False,
        lt: CublasLt | None = None,
        empty: Callable[..., Any] | None = None,
        library_call: Callable[..., Any] | None = None,
        watched: Watch = unwatched,
    ) -> None:
        self.xp = xp
        self._empty = empty  # allocates the arrays of `scratch`: (size, dtype=…); None for xp.empty
        self.library_call: Callable[..., Any] = library_call or _call
        """Calls a library function on arrays, in order with the device's queue of kernels:
        `library_call(function, *arguments, **named)`."""
        self.tf32 = tf32
        """Whether float32 matrix products on a GPU round their operands to TF32; accumulation is in fp32 either way."""
        self.lt = lt
        """cuBLASLt for matrix products; None if it is not available."""
        self.watched = watched
        """Profiler range of one launch, by kernel name: `Ranges.kernel`."""
        self._module_class = module_class
        self._on_gpu = xp is not np
        self._null = np.uint64(0) if self._on_gpu else None  # CuPy cannot pass None as a pointer
        self._kernels: dict[tuple[Variant, str], Any] = {}
        self._plans: dict[tuple[Variant, str], _Plan] = {}
        self._scratch: dict[tuple[str, str], Any] = {}
        self._counters: Any = None
        self._outgrown: list[Any] = []  # kept alive, because captured graphs still use their addresses

    def launch(
        self,
        variant: Variant,
        name: str,
        grid: tuple[int, ...],
        block: int,
        arguments: Mapping[str, Any],
        *,
        shared_bytes: int = 0,
        strided: frozenset[str] = frozenset(),
    ) -> None:
        """Launch entry point `name` on `grid` blocks of `block` threads; no effect for an empty grid.

        `arguments` by the names of the kernel's parameters or, where it takes a struct, of that struct's fields, as
        `Field.name` has them; None is a null pointer. Arrays must have the declared dtype and lie C-contiguous unless
        named in `strided`. UserError naming kernel and argument otherwise.
        """
        plan = self._plans.get((variant, name)) or self._plan(variant, name)
        if arguments.keys() != plan.fields.keys():
            raise TypeError(_other_arguments(name, plan.fields, arguments))
        current = self.xp.cuda.runtime.getDevice() if self._on_gpu else 0
        values = []
        for argument, (field, kind) in plan.fields.items():
            value = arguments[argument]
            if not field.pointer:
                value = _scalar(name, field, kind, value)
            elif value is not None:
                self._check_array(name, field, kind, value, argument in strided, current)
            elif plan.layout is None:
                value = self._null
            values.append(value)
        if math.prod(grid) == 0:
            return
        if any(size > limit for size, limit in zip(grid, MAXIMUM_GRID, strict=False)):
            raise UserError(f"{name}: a grid of {grid} blocks passes what CUDA takes, {MAXIMUM_GRID}")
        kernel = self.kernel(variant, name)
        if shared_bytes > MAXIMUM_SHARED_BYTES and kernel.max_dynamic_shared_size_bytes < shared_bytes:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
        try:
            with self.watched(name):
                kernel(grid, (block,), plan.pack(values), shared_mem=shared_bytes)
        except BaseException:
            self._counters = None  # a launch that failed midway may leave them nonzero
            raise

    def scratch(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        """Uninitialised array of this shape, reused by the next call with this name; allocates only to grow."""
        size = math.prod(shape)
        flat = self._scratch.get((name, dtype))
        if flat is None or flat.size < size:
            self._outgrown += [] if flat is None else [flat]
            flat = self._scratch[name, dtype] = self._new(size, dtype)
        return flat[:size].reshape(shape)

    def on_device(self, name: str, values: Any, dtype: str) -> Any:
        """`values` as a flat device array: itself if it is one, else copied to the scratch array `name`."""
        if isinstance(values, self.xp.ndarray):
            return values
        host = np.array(values, dtype=dtype).reshape(-1)
        array = self.scratch(name, host.shape, dtype)
        array[...] = self.xp.asarray(host)
        return array

    def counters(self, count: int) -> Any:
        """`count` uint32 zeros for a kernel that resets them to zero, so that they are cleared once, not at every call.

        Reallocated if more are needed and after a failed launch. Like all scratch arrays, they are for launches on one
        stream, in order; on two streams at once, blocks could deadlock. The first call must not be in a stream capture,
        which would record the clearing instead of executing it. A kernel that crashes on a GPU destroys its context, so
        no later call can find the counters it left.
        """
        if self._counters is None or self._counters.size < count:
            self._outgrown += [] if self._counters is None else [self._counters]
            self._counters = self._new(count, "uint32")
            self._counters[...] = 0
        return self._counters[:count]

    def _new(self, size: int, dtype: str) -> Any:
        return (self._empty or self.xp.empty)(size, dtype=dtype)

    def kernel(self, variant: Variant, name: str) -> Any:
        """The compiled kernel `name`, from `module_class`."""
        kernel = self._kernels.get((variant, name))
        if kernel is None:
            module = self._module_class(code=load_source(variant.source), options=variant.options)
            for entry in kernel_parameters(variant.source):
                self._kernels[variant, entry] = module.get_function(variant.entry(entry))
            kernel = self._kernels[variant, name]
        return kernel

    def _plan(self, variant: Variant, name: str) -> _Plan:
        """Made once, from the source."""
        signature = kernel_parameters(variant.source)[name]
        fields = {
            field.name: (field, DTYPES[variant.dtype_of(field.type)] if field.pointer else SCALARS[field.type])
            for field in signature.fields
        }
        found = signature.struct
        plan = _Plan(fields, None, ()) if found is None else _Plan(fields, struct.Struct(found.format), found.offsets)
        self._plans[variant, name] = plan
        return plan

    def _check_array(
        self, kernel: str, field: Field, dtype: np.dtype[Any], array: Any, strided: bool, current: int
    ) -> None:
        """UserError when the kernel would misread `array`. `current`: the GPU that will run it."""
        where = f"{kernel}: argument {field.name}"
        if not isinstance(array, self.xp.ndarray):
            raise UserError(f"{where} is a {type(array).__name__}; it must be a {self.xp.__name__} array")
        if array.dtype != dtype:
            raise UserError(f"{where} has dtype {array.dtype.name}; it must be {dtype.name}")
        if not strided and not array.flags.c_contiguous:
            raise UserError(f"{where} is not contiguous: shape {array.shape}, strides {array.strides}")
        aligned = array.data.ptr % dtype.itemsize == 0 if self._on_gpu else array.flags.aligned
        if not aligned:
            raise UserError(f"{where} is not aligned to its {dtype.itemsize}-byte elements")
        if not self._on_gpu and not field.constant and not array.flags.writeable:
            raise UserError(f"{where} is read-only; the kernel writes to it")
        if self._on_gpu and array.device.id != current:
            raise UserError(f"{where} is on GPU {array.device.id}; the current one is {current}")


def _call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return function(*arguments, **named)


def _other_arguments(kernel: str, fields: Iterable[str], arguments: Iterable[str]) -> str:
    """What is wrong with the names of a launch's arguments, in one line."""
    missing = [name for name in fields if name not in arguments]
    unknown = [name for name in arguments if name not in fields]
    wrong = {"missing": missing, "unknown": unknown}
    said = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
    return f"{kernel} takes {', '.join(fields)}; {said}"


def _scalar(kernel: str, field: Field, convert: Any, value: Any) -> Any:
    try:
        return convert(value)
    except (OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{kernel}: argument {field.name} is {value!r}, not a {field.type}") from error
