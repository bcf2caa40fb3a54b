"""Specification of an operation: its reference function, marked with `@operation`.

The function's name, signature and docstring hold for the implementations on all sides (`cllm_gpu.ops.registry`); the
decorator adds what a signature does not say.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

Operation = Callable[..., Any]
Side = Literal["native", "cuda"]
"""Implementations besides the reference."""
SIDES: tuple[Side, ...] = get_args(Side)
_Function = TypeVar("_Function", bound=Operation)


@dataclass(frozen=True)
class Specification:
    """One operation."""

    reference: Operation
    """The reference function; its first parameter is the array module."""
    writes: tuple[str, ...]
    """Parameters whose arrays are written: outputs and arrays updated in place."""
    flat: bool
    """Whether it takes flat arrays (n,) of any part of a buffer, element by element, and returns a float64 sum; it
    widens bfloat16 itself, a tile at a time."""
    sides: tuple[Side, ...]
    """Which sides have a function of their own for it."""

    @property
    def name(self) -> str:
        """Name of the operation, of its function on every side, and of the attribute of `Operations`."""
        return self.reference.__name__

    @property
    def module(self) -> str:
        """Name of the module that holds it on every side."""
        return self.reference.__module__.rpartition(".")[2]


def operation(
    *, writes: tuple[str, ...] = (), flat: bool = False, sides: tuple[Side, ...] = SIDES
) -> Callable[[_Function], _Function]:
    """Mark a reference function as an operation: the function itself, with a `Specification` as its attribute.

    sides: () for an operation that only the reference has. The native backend then takes the reference, which computes
    with the same arrays; on the CUDA side a call is a UserError.

    ValueError for a name in `writes` that is no parameter.
    """

    def mark(function: _Function) -> _Function:
        if unknown := set(writes) - set(inspect.signature(function).parameters):
            raise ValueError(f"{function.__name__} has no parameter {', '.join(sorted(unknown))}")
        vars(function)["specification"] = Specification(function, writes, flat, sides)
        return function

    return mark
