"""Compiles the CUDA sources at first use and launches their kernels with checked, typed arguments.

The same code drives an NVIDIA GPU (CuPy arrays, cupy.RawModule) and the simulator (NumPy arrays, its RawModule).
Kernel signatures are read from the sources, so they cannot disagree: pointers are checked by dtype, scalars by C type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from cllm_gpu.ops.cuda.kernel_source import Parameter, kernel_parameters, load_source
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.profiling import Watch, unwatched

if TYPE_CHECKING:
    from cllm_gpu.ops.cuda.cublaslt import CublasLt

_SCALARS: dict[str, Any] = {
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
    "double": np.float64,
}
_POINTED: dict[str, str] = {
    "float": "float32",
    "double": "float64",
    "int": "int32",
    "long long": "int64",
    "unsigned": "uint32",
}
_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name) for name in ("float32", "float64", "int32", "int64", "uint32")
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
_STORAGE = {_DTYPES[name]: name for name in ("float32", "bfloat16")}
MAXIMUM_GRID = (2**31 - 1, 65535, 65535)
"""Largest grid, in blocks along each axis (CUDA C++ programming guide, 16.2)."""
MAXIMUM_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory available to a kernel without opt-in (CUDA C++ programming guide, 16.4)."""


@dataclass(frozen=True)
class Variant:
    """A compilation of a source: the dtype of `real`, the dtype of `gradient`, and further macros."""

    source: str
    storage: str
    gradient: str = ""
    """dtype of parameter gradients: that of `storage` (also if empty), or float32."""
    defines: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.gradient not in ("", self.storage, "float32"):
            raise UserError(
                f"{self.source}: gradients of dtype {self.gradient} beside arrays of dtype {self.storage}; "
                f"they must be {' or '.join(dict.fromkeys((self.storage, 'float32')))}"
            )
        if self.gradient == self.storage:
            object.__setattr__(self, "gradient", "")  # one variant, one name

    @property
    def options(self) -> tuple[str, ...]:
        """Compiler options of this variant."""
        flags = [f"-D{name}={value}" for name, value in self.defines]
        if self.storage == "bfloat16":
            flags.append("-DCLLM_BF16=1")
        if self.gradient == "float32":
            flags.append("-DCLLM_GRADIENT_FLOAT=1")
        return ("-std=c++17", *flags)

    def dtype_of(self, type_name: str) -> str:
        """Name of the array dtype for a pointer to `type_name`."""
        if type_name == "real":
            return self.storage
        if type_name == "gradient":
            return self.gradient or self.storage
        if type_name == "table":
            return self.storage if ("CLLM_REAL_TABLE", 1) in self.defines else "float32"
        return _POINTED[type_name]

    def entry(self, name: str) -> str:
        """Symbol name of `ENTRY(name)` in this variant."""
        return f"{name}_{self.storage}"


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
        self._plans: dict[tuple[Variant, str], dict[str, tuple[Parameter, Any]]] = {}
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

        `arguments` are keyed by the kernel's parameter names; None is a null pointer. Arrays must have the declared
        dtype and be C-contiguous unless named in `strided`. Raises UserError naming kernel and argument otherwise.
        """
        plan = self._plans.get((variant, name)) or self._plan(variant, name)
        if arguments.keys() != plan.keys():
            raise TypeError(f"{name} takes {list(plan)}, not {list(arguments)}")
        current = self.xp.cuda.runtime.getDevice() if self._on_gpu else 0
        values = []
        for parameter, (entry, kind) in plan.items():
            value = arguments[parameter]
            if not entry.pointer:
                value = _scalar(name, entry, kind, value)
            elif value is None:
                value = self._null
            else:
                self._check_array(name, entry, kind, value, parameter in strided, current)
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
                kernel(grid, (block,), tuple(values), shared_mem=shared_bytes)
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

    def _plan(self, variant: Variant, name: str) -> dict[str, tuple[Parameter, Any]]:
        """Each parameter with its array dtype if it is a pointer, else its NumPy scalar type; cached."""
        plan = {
            parameter.name: (
                parameter,
                _DTYPES[variant.dtype_of(parameter.type)] if parameter.pointer else _SCALARS[parameter.type],
            )
            for parameter in kernel_parameters(variant.source)[name]
        }
        self._plans[variant, name] = plan
        return plan

    def _check_array(
        self, kernel: str, parameter: Parameter, dtype: np.dtype[Any], array: Any, strided: bool, current: int
    ) -> None:
        """Raise UserError if `array` does not fit the parameter. `current`: the GPU that will run the kernel."""
        where = f"{kernel}: argument {parameter.name}"
        if not isinstance(array, self.xp.ndarray):
            raise UserError(f"{where} is a {type(array).__name__}; it must be a {self.xp.__name__} array")
        if array.dtype != dtype:
            raise UserError(f"{where} has dtype {array.dtype.name}; it must be {dtype.name}")
        if not strided and not array.flags.c_contiguous:
            raise UserError(f"{where} is not contiguous: shape {array.shape}, strides {array.strides}")
        aligned = array.data.ptr % dtype.itemsize == 0 if self._on_gpu else array.flags.aligned
        if not aligned:
            raise UserError(f"{where} is not aligned to its {dtype.itemsize}-byte elements")
        if not self._on_gpu and not parameter.constant and not array.flags.writeable:
            raise UserError(f"{where} is read-only; the kernel writes to it")
        if self._on_gpu and array.device.id != current:
            raise UserError(f"{where} is on GPU {array.device.id}; the current one is {current}")


def _call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return function(*arguments, **named)


def _scalar(kernel: str, parameter: Parameter, convert: Any, value: Any) -> Any:
    try:
        return convert(value)
    except (OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{kernel}: argument {parameter.name} is {value!r}, not a {parameter.type}") from error


def storage_of(operation: str, name: str, array: Any) -> str:
    """dtype name of an array of activations or weights, "float32" or "bfloat16". Raises UserError for another."""
    kind = _STORAGE.get(array.dtype)
    if kind is None:
        raise UserError(f"{operation}: argument {name} has dtype {array.dtype.name}; it must be float32 or bfloat16")
    return kind


class Shapes:
    """Checks the shapes of one call: each letter stands for the same size throughout.

    >>> check = Shapes("linear_forward")
    >>> rows, columns = check("x", x, "N K")
    """

    def __init__(self, operation: str, **sizes: int) -> None:
        self.operation = operation
        self._sizes = dict(sizes)

    def __call__(self, name: str, array: Any, letters: str) -> tuple[int, ...]:
        """Shape of `array`; () if it is None. Raises UserError if it contradicts the letters bound so far."""
        wanted = letters.split()
        if array is None:
            return ()
        shape = tuple(array.shape)
        if len(shape) != len(wanted):
            raise UserError(f"{self.operation}: argument {name} has shape {shape}; it must have {len(wanted)} axes")
        for letter, size in zip(wanted, shape, strict=True):
            if self._sizes.setdefault(letter, size) != size:
                expected = tuple(self._sizes.get(w, w) for w in wanted)
                raise UserError(f"{self.operation}: argument {name} has shape {shape}; it must be {expected}")
        return shape


def blocks_for(elements: int, per_block: int) -> int:
    """Number of blocks that cover `elements`, `per_block` each."""
    return -(-elements // per_block)


def is_wide(columns: int, *arrays: Any) -> bool:
    """Whether rows of `columns` elements allow 16-byte loads in all of the arrays; None is ignored."""
    present = [array for array in arrays if array is not None]
    width = 16 // present[0].dtype.itemsize
    return columns % width == 0 and all(address_of(array) % 16 == 0 for array in present)


def address_of(array: Any) -> int:
    """Address of an array's first element, on the host or on a GPU."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def element_strides(operation: str, name: str, array: Any) -> tuple[int, ...]:
    """Strides in elements of all axes but the last. Raises UserError unless the last axis is contiguous.

    Strides of empty arrays and of axes of size 1 are never used and not checked.
    """
    size = array.dtype.itemsize
    if array.size and array.shape[-1] > 1 and array.strides[-1] != size:
        raise UserError(f"{operation}: argument {name} has strides {array.strides}; its last axis must be contiguous")
    if any(stride % size for stride in array.strides[:-1]):
        raise UserError(f"{operation}: argument {name} has strides {array.strides}, not whole elements")
    return tuple(stride // size for stride in array.strides[:-1])
