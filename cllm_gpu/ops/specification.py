"""Specification of an operation: its reference function, marked with `@operation`.

The function's name, signature and docstring hold for the implementations on all sides (`cllm_gpu.ops.registry`); the
decorator adds what a signature does not say.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Operation = Callable[..., Any]
_Function = TypeVar("_Function", bound=Operation)


@dataclass(frozen=True)
class Specification:
    """One operation."""

    reference: Operation
    """The reference function; its first parameter is the array module."""
    writes: tuple[str, ...]
    """Parameters whose arrays are written: outputs and arrays updated in place."""
    flat: bool
    """Whether the operation works element by element on flat arrays (n,), any slice of a buffer, and returns a float64
    sum. It upcasts bfloat16 itself, a tile at a time."""

    @property
    def name(self) -> str:
        """Name of the operation, of its function on every side, and of the attribute of `Operations`."""
        return self.reference.__name__

    @property
    def module(self) -> str:
        """Name of the module that holds it on every side."""
        return self.reference.__module__.rpartition(".")[2]


def operation(*, writes: tuple[str, ...] = (), flat: bool = False) -> Callable[[_Function], _Function]:
    """Decorator that marks a reference function as an operation: it attaches a `Specification`.

    Raises ValueError if a name in `writes` is not a parameter.
    """

    def mark(function: _Function) -> _Function:
        if unknown := set(writes) - set(inspect.signature(function).parameters):
            raise ValueError(f"{function.__name__} has no parameter {', '.join(sorted(unknown))}")
        vars(function)["specification"] = Specification(function, writes, flat)
        return function

    return mark
