"""`RawKernel` and `RawModule` with CuPy's signatures, running on the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

from cllm_gpu.errors import UserError
from cllm_gpu.simulator import launch
from cllm_gpu.simulator.build import Built, build
from cllm_gpu.simulator.launch import Library, Schedule

DEFAULT_SHARED_LIMIT = 48 * 1024
MAXIMUM_SHARED_LIMIT = 227 * 1024
_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_BLOCK_LIMITS = (1024, 1024, 64)


@functools.lru_cache(maxsize=256)
def _load(code: str, options: tuple[str, ...], expressions: tuple[str, ...], checked: bool) -> tuple[Built, Library]:
    built = build(code, options, expressions, checked)
    return built, Library(built.library)


def _check_by_default() -> bool:
    return os.environ.get("CLLM_SIMULATOR_CHECK", "") not in ("", "0")


class RawModule:
    """CUDA source with one or more kernels; the counterpart of cupy.RawModule.

    code: CUDA C++ source. options: NVRTC options (-D, -I and -std matter here, the rest is accepted and ignored).
    name_expressions: instantiations of templates to make available, as in CuPy.
    check: compile with every memory access checked (slower); None takes it from $CLLM_SIMULATOR_CHECK.
    """

    def __init__(
        self,
        code: str | None = None,
        *,
        path: str | None = None,
        options: Sequence[str] = (),
        backend: str = "nvrtc",
        name_expressions: Sequence[str] | None = None,
        check: bool | None = None,
    ) -> None:
        if code is None:
            raise UserError("the simulator takes CUDA source (code=…); it cannot run a compiled cubin or PTX file")
        self.code, self.options, self.backend = code, tuple(options), backend
        self.name_expressions = tuple(name_expressions or ())
        self.check = _check_by_default() if check is None else check

    def compile(self) -> None:
        """Compile now rather than at the first `get_function`. Raises UserError with the compiler's first error."""
        _load(self.code, self.options, self.name_expressions, self.check)

    def get_function(self, name: str) -> RawKernel:
        """The kernel `name` (an extern "C" function or one of the name expressions)."""
        return RawKernel._of(self, name)


class RawKernel:
    """One kernel of a CUDA source; the counterpart of cupy.RawKernel, called as `kernel(grid, block, args)`."""

    def __init__(
        self, code: str, name: str, options: Sequence[str] = (), backend: str = "nvrtc", *, check: bool | None = None
    ) -> None:
        self._setup(RawModule(code, options=options, backend=backend, check=check), name)

    @classmethod
    def _of(cls, module: RawModule, name: str) -> RawKernel:
        kernel = cls.__new__(cls)
        kernel._setup(module, name)
        kernel._resolved  # noqa: B018 - an unknown name is an error at once, as in CuPy
        return kernel

    def _setup(self, module: RawModule, name: str) -> None:
        self.module, self.name = module, name
        self.code, self.options, self.backend = module.code, module.options, module.backend
        self._shared_limit = DEFAULT_SHARED_LIMIT

    @functools.cached_property
    def _resolved(self) -> tuple[Library, Any, tuple[launch.Parameter, ...]]:
        module = self.module
        built, library = _load(module.code, module.options, module.name_expressions, module.check)
        if self.name not in built.expressions:
            known = ", ".join(built.expressions) or "none"
            raise UserError(f"the CUDA source has no kernel {self.name!r}; it has: {known}")
        base = self.name.partition("<")[0].split("::")[-1].strip()
        declared = next((k for k in built.kernels if k.name == base), None)
        if declared and not declared.is_extern_c and not module.name_expressions:
            raise UserError(f'kernel {self.name!r} must be declared extern "C": CuPy finds it by its plain name only')
        kernel = library.kernel(built.expressions.index(self.name))
        return library, kernel, launch.parameters_of(kernel, declared.parameters if declared else ())

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """Dynamic shared memory a launch may ask for; above 48 KB only after this was raised, as on a GPU."""
        return self._shared_limit

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, value: int) -> None:
        if not 0 <= value <= MAXIMUM_SHARED_LIMIT:
            raise UserError(f"max_dynamic_shared_size_bytes must be from 0 to {MAXIMUM_SHARED_LIMIT}, not {value}")
        self._shared_limit = value

    def compile(self) -> None:
        """Compile now rather than at the first launch."""
        self._resolved  # noqa: B018

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        schedule: Schedule | None = None,
    ) -> None:
        """Run the kernel over `grid` blocks of `block` threads. Raises UserError (KernelFault for a finding)."""
        library, kernel, parameters = self._resolved
        blocks = launch.as_dimensions("grid", grid, _GRID_LIMITS)
        threads = launch.as_dimensions("block", block, _BLOCK_LIMITS)
        if threads[0] * threads[1] * threads[2] > launch.MAXIMUM_THREADS:
            raise UserError(f"kernel {self.name}: block {block!r} has more than {launch.MAXIMUM_THREADS} threads")
        if not 0 <= shared_mem <= self._shared_limit:
            raise UserError(
                f"kernel {self.name}: shared_mem is {shared_mem} bytes, above the limit of {self._shared_limit}; "
                f"raise max_dynamic_shared_size_bytes first (at most {MAXIMUM_SHARED_LIMIT})"
            )
        chosen = schedule or Schedule()
        launch.run(library, kernel, self.name, parameters, blocks, threads, args, shared_mem, chosen)
