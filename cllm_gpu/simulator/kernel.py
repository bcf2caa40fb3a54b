"""`RawKernel` and `RawModule` with CuPy's signatures, running on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cllm_gpu.simulator import graphs, settings
from cllm_gpu.simulator.build import CompiledSource, build
from cllm_gpu.simulator.launch import MAXIMUM_THREADS, Function, Launch, Library, Schedule
from cllm_gpu.simulator.traffic import Traffic
from cllm_gpu.utils.errors import UserError

DEFAULT_SHARED_LIMIT = 48 * 1024
MAXIMUM_SHARED_LIMIT = 227 * 1024
_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_BLOCK_LIMITS = (1024, 1024, 64)


@functools.lru_cache(maxsize=512)
def _load(
    code: str, options: tuple[str, ...], expressions: tuple[str, ...], checked: bool
) -> tuple[CompiledSource, Library]:
    built = build(code, options, expressions, checked)
    return built, Library(built.library, checked, built.variables)


class RawModule:
    """CUDA source with one or more kernels; the counterpart of cupy.RawModule.

    code: CUDA C++ source; or path: a file that contains it (in CuPy, a compiled file).
    options: NVRTC options; -D, -U, -I and -std apply, others are ignored.
    name_expressions: template instantiations to make available, as in CuPy.
    check: True compiles with every memory access checked (slower); None: as set by `simulator.settings` or
    $CLLM_SIMULATOR_CHECK at the launch.
    """

    def __init__(
        self,
        code: str | None = None,
        *,
        path: str | None = None,
        options: Sequence[str] = (),
        backend: str = "nvrtc",
        translate_cucomplex: bool = False,
        enable_cooperative_groups: bool = False,
        name_expressions: Sequence[str] | None = None,
        jitify: bool = False,
        check: bool | None = None,
    ) -> None:
        if translate_cucomplex or enable_cooperative_groups:
            raise UserError("the simulator has neither cuComplex.h nor cooperative groups")
        if (code is None) == (path is None):
            raise UserError("RawModule takes either code=… or path=…")
        if path is not None and Path(path).suffix in (".cubin", ".ptx", ".fatbin"):
            raise UserError(f"the simulator runs CUDA source, not compiled code: {path}")
        self.code = Path(path).read_text(encoding="utf-8") if path is not None else str(code)
        self.options, self.backend = tuple(options), backend
        self.name_expressions = tuple(name_expressions or ())
        self.check = check

    def compile(self) -> None:
        """Compile now instead of at the first `get_function`. Raises UserError with the compiler's first error."""
        self._load(self._checked())

    def get_function(self, name: str) -> RawKernel:
        """The kernel `name`, an extern "C" function or one of the name expressions. Raises UserError if not found."""
        kernel = RawKernel.__new__(RawKernel)
        kernel._setup(self, name)
        kernel.compile()
        return kernel

    def get_global(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a `__device__` or `__constant__` variable, for reading and writing.

        np.ndarray(shape, dtype, buffer=module.get_global(name)) is the array, as in CuPy with memptr=. Checked and
        unchecked launches have separate variables; this is the one that a launch with the current settings uses.
        """
        variables = self._load(self._checked())[1].variables
        if name not in variables:
            known = ", ".join(variables) or "none"
            raise UserError(f"the CUDA source has no __device__ or __constant__ variable {name!r}; it has: {known}")
        return variables[name]

    def _checked(self) -> bool:
        return settings.current().check if self.check is None else self.check

    def _load(self, checked: bool) -> tuple[CompiledSource, Library]:
        return _load(self.code, self.options, self.name_expressions, checked)


class RawKernel:
    """One kernel of a CUDA source; the counterpart of cupy.RawKernel, called as `kernel(grid, block, args)`."""

    last_traffic: Traffic | None = None
    """Bank conflicts and sectors of the last launch that counted them."""

    def __init__(
        self, code: str, name: str, options: Sequence[str] = (), backend: str = "nvrtc", *, check: bool | None = None
    ) -> None:
        self._setup(RawModule(code, options=options, backend=backend, check=check), name)

    def _setup(self, module: RawModule, name: str) -> None:
        self._module, self.name = module, name
        self.code, self.options, self.backend = module.code, module.options, module.backend
        self._shared_limit = DEFAULT_SHARED_LIMIT
        self._functions: dict[bool, Function] = {}

    def _function(self, checked: bool) -> Function:
        if checked not in self._functions:
            self._functions[checked] = self._find(checked)
        return self._functions[checked]

    def _find(self, checked: bool) -> Function:
        built, library = self._module._load(checked)
        if self.name not in built.expressions:
            known = ", ".join(built.expressions) or "none"
            raise UserError(f"the CUDA source has no kernel {self.name!r}; it has: {known}")
        base = self.name.partition("<")[0].split("::")[-1].strip()
        declared = next((k for k in built.kernels if k.name == base), None)
        if declared and not declared.is_extern_c and not self._module.name_expressions:
            raise UserError(f'kernel {self.name!r} must be declared extern "C": CuPy finds it by its plain name only')
        index = built.expressions.index(self.name)
        return Function(library, index, self.name, declared.parameters if declared else ())

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """Maximum dynamic shared memory of a launch; as on a GPU, it must be raised for more than 48 KB."""
        return self._shared_limit

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, value: int) -> None:
        if not 0 <= value <= MAXIMUM_SHARED_LIMIT:
            raise UserError(f"max_dynamic_shared_size_bytes must be from 0 to {MAXIMUM_SHARED_LIMIT}, not {value}")
        self._shared_limit = value

    @property
    def max_threads_per_block(self) -> int:
        """Maximum number of threads per block."""
        return MAXIMUM_THREADS

    @property
    def attributes(self) -> dict[str, int]:
        """The attributes of CuPy that are meaningful without a GPU."""
        return {
            "max_threads_per_block": self.max_threads_per_block,
            "max_dynamic_shared_size_bytes": self.max_dynamic_shared_size_bytes,
        }

    def compile(self) -> None:
        """Compile now instead of at the first launch."""
        self._function(self._module._checked())

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        schedule: Schedule | None = None,
    ) -> None:
        """Run the kernel with `grid` blocks of `block` threads.

        Raises UserError for invalid arguments, KernelError for an error in the kernel.
        """
        chosen = settings.current()
        blocks = _dimensions("grid", grid, _GRID_LIMITS)
        threads = _dimensions("block", block, _BLOCK_LIMITS)
        if threads[0] * threads[1] * threads[2] > MAXIMUM_THREADS:
            raise UserError(f"kernel {self.name}: block {block!r} has more than {MAXIMUM_THREADS} threads")
        if not 0 <= shared_mem <= self._shared_limit:
            raise UserError(
                f"kernel {self.name}: shared_mem is {shared_mem} bytes, above the limit of {self._shared_limit}; "
                f"raise max_dynamic_shared_size_bytes first (at most {MAXIMUM_SHARED_LIMIT})"
            )
        if graphs.record_launch(self, self.name, args, grid, block, args, shared_mem=shared_mem, schedule=schedule):
            return
        function = self._function(self._module._checked())
        order = schedule or chosen.schedule
        found = function.run(
            Launch(blocks, threads, tuple(args), shared_mem, order, chosen.count_traffic, chosen.seconds)
        )
        self.last_traffic = found or self.last_traffic


def _dimensions(what: str, value: Any, limits: tuple[int, int, int]) -> tuple[int, int, int]:
    """A grid or block size as three numbers. Raises UserError if CUDA would reject it."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not 1 <= len(sizes) <= 3 or not all(isinstance(n, (int, np.integer)) for n in sizes):
        raise UserError(f"{what} must be a tuple of one to three integers, not {value!r}")
    x, y, z = (*map(int, sizes), 1, 1)[:3]
    for axis, size, limit in zip("xyz", (x, y, z), limits, strict=True):
        if not 1 <= size <= limit:
            raise UserError(f"{what} {value!r}: {axis} must be from 1 to {limit}")
    return x, y, z
