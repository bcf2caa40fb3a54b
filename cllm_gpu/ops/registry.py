"""The operations that models and optimizers are built from, and their implementations on each side.

An operation is a function of `ops/reference/` marked with `@operation`. `ops/native/` (C++ for the CPU) and `ops/cuda/`
(kernels, on a GPU or the simulator) implement it under the same name in a file of the same name: `gelu_forward` is in
reference/gelu.py, native/gelu.py and cuda/gelu.py. All signatures are equal but for the first parameter, which is what
the side computes with: an array module, a `Library` or a `Launcher`. It is bound here, so a model never sees it.
To add an operation, write its reference function and one of the same name on each side; list a new file in FILES.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from cllm_gpu.ops.native import LEFT_TO_REFERENCE
from cllm_gpu.ops.reference import (
    adam,
    attention,
    cross_entropy,
    embedding,
    gelu,
    layernorm,
    linear,
    mlp,
    rotary,
    sgd,
    squared_norm,
)
from cllm_gpu.ops.reference.bfloat16 import in_bfloat16
from cllm_gpu.ops.specification import Operation, Specification

if TYPE_CHECKING:
    from cllm_gpu.ops.cuda.launcher import Launcher
    from cllm_gpu.ops.native.library import Library
    from cllm_gpu.utils.profiling import Ranges

FILES = (embedding, linear, gelu, mlp, layernorm, rotary, attention, cross_entropy, squared_norm, adam, sgd)
OPERATIONS: dict[str, Specification] = {
    found.name: found
    for module in FILES
    for function in vars(module).values()
    if isinstance(found := getattr(function, "specification", None), Specification)
}
"""By name, in the order of the files."""
Side = Literal["reference", "native", "cuda"]


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


def implementation(name: str, side: Side) -> Operation:
    """The function that implements an operation on a side. Raises AttributeError if its module lacks one."""
    module = importlib.import_module(f"cllm_gpu.ops.{side}.{OPERATIONS[name].module}")
    function: Operation = getattr(module, name)
    return function


def reference_operations(xp: Any, *, bfloat16: bool = False) -> Operations:
    """The reference on arrays of module `xp`; `bfloat16` wraps it as in `cllm_gpu.ops.reference.bfloat16`."""
    plain = {name: found.reference for name, found in OPERATIONS.items()}
    functions = in_bfloat16(OPERATIONS.values()) if bfloat16 else plain
    return Operations({name: functools.partial(function, xp) for name, function in functions.items()})


def native_operations(library: Library) -> Operations:
    """The C++ operations; those in `cllm_gpu.ops.native.LEFT_TO_REFERENCE` are the reference on NumPy arrays."""
    written = [name for name in OPERATIONS if name not in LEFT_TO_REFERENCE]
    bound = {name: functools.partial(implementation(name, "native"), library) for name in written}
    return reference_operations(np).replace(**bound)


def cuda_operations(launcher: Launcher, ranges: Ranges) -> Operations:
    """The CUDA operations, launching through `launcher`, each in a profiler range with its name."""
    bound = {name: functools.partial(implementation(name, "cuda"), launcher) for name in OPERATIONS}
    return Operations({name: _in_range(ranges, name, operation) for name, operation in bound.items()})


def _in_range(ranges: Ranges, name: str, operation: Operation) -> Operation:
    label = f"operation/{name}"

    @functools.wraps(operation)
    def ranged(*arguments: Any, **options: Any) -> Any:
        with ranges(label):
            return operation(*arguments, **options)

    return ranged
