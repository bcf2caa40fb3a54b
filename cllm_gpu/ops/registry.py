"""The operations that models and optimizers are built from, and their implementations on each side.

An operation is a function of `ops/reference/` marked with `@operation`. `ops/native/` (C++ for the CPU) and `ops/cuda/`
(kernels, on a GPU or the simulator) have a function of the same name in a file of the same name: `gelu_forward` of
reference/gelu.py is `gelu_forward` of native/gelu.py and of cuda/gelu.py. All take the same parameters after the first,
which is what a side computes with: an array module, a library, a launcher. It is bound here, so that a model never
sees it. A new operation is its reference function and one of that name on each side that the decorator names; nothing
is listed here.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from cllm_gpu.ops import reference
from cllm_gpu.ops.reference.bfloat16 import in_bfloat16
from cllm_gpu.ops.specification import Operation, Side, Specification
from cllm_gpu.utils.errors import UserError

if TYPE_CHECKING:
    from cllm_gpu.ops.cuda.launcher import Launcher
    from cllm_gpu.ops.native.library import Library
    from cllm_gpu.utils.profiling import Ranges


def _specifications() -> dict[str, Specification]:
    modules = (
        importlib.import_module(f"{reference.__name__}.{file.name}")
        for file in pkgutil.iter_modules(reference.__path__)
    )
    functions = (function for module in modules for function in vars(module).values())
    found = (getattr(function, "specification", None) for function in functions)
    return {each.name: each for each in found if isinstance(each, Specification)}


OPERATIONS = _specifications()
"""By name, in the order of the files of `ops/reference/`."""


class Operations:
    """All operations, each an attribute under its name, ready to call with arrays; immutable.

    Signatures and docstrings are those of `cllm_gpu.ops.reference`, without the first parameter.
    """

    def __init__(self, functions: Mapping[str, Operation]) -> None:
        """functions: one for every name in OPERATIONS. Raises TypeError otherwise."""
        if different := set(functions) ^ set(OPERATIONS):
            raise TypeError(f"not one function for each operation: {', '.join(sorted(different))}")
        vars(self).update(functions)

    def replace(self, **functions: Operation) -> Operations:
        """A copy with the named operations replaced. Raises TypeError for an unknown name."""
        return Operations(vars(self) | functions)

    def __getattr__(self, name: str) -> Operation:
        raise AttributeError(f"no operation is called {name!r}")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"operations are immutable: replace({name}=…) gives a copy")


def operations_on(side: Side) -> tuple[str, ...]:
    """Names of the operations that a side has a function of its own for."""
    return tuple(name for name, found in OPERATIONS.items() if side in found.sides)


def implementation(name: str, side: Literal["reference"] | Side) -> Operation:
    """The function of an operation on a side; AttributeError if its file there has none of this name."""
    module = importlib.import_module(f"cllm_gpu.ops.{side}.{OPERATIONS[name].module}")
    function: Operation = getattr(module, name)
    return function


def reference_operations(xp: Any, *, bfloat16: bool = False) -> Operations:
    """The reference on arrays of module `xp`; `bfloat16` wraps it as in `cllm_gpu.ops.reference.bfloat16`."""
    plain = {name: found.reference for name, found in OPERATIONS.items()}
    functions = in_bfloat16(OPERATIONS.values()) if bfloat16 else plain
    return Operations({name: functools.partial(function, xp) for name, function in functions.items()})


def native_operations(library: Library) -> Operations:
    """The C++ side; what it does not have is the reference on NumPy arrays."""
    bound = {name: functools.partial(implementation(name, "native"), library) for name in operations_on("native")}
    return reference_operations(np).replace(**bound)


def cuda_operations(launcher: Launcher, ranges: Ranges) -> Operations:
    """The CUDA side launching through `launcher`, each operation in a profiler range of its name.

    One that it does not have is a UserError when it is called.
    """
    bound = {name: functools.partial(_without_kernel, name) for name in OPERATIONS}
    bound |= {name: functools.partial(implementation(name, "cuda"), launcher) for name in operations_on("cuda")}
    return Operations({name: _in_range(ranges, name, operation) for name, operation in bound.items()})


def _without_kernel(name: str, *_: Any, **__: Any) -> NoReturn:
    raise UserError(f"operation {name} has no CUDA kernel: choose the backend native or numpy")


def _in_range(ranges: Ranges, name: str, operation: Operation) -> Operation:
    label = f"operation/{name}"

    @functools.wraps(operation)
    def ranged(*arguments: Any, **options: Any) -> Any:
        with ranges(label):
            return operation(*arguments, **options)

    return ranged
