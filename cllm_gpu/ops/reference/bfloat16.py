"""The operations on NumPy arrays of bfloat16: every array is widened to float32, what is written is rounded once.

NumPy itself would sum bfloat16 in bfloat16 (100,000 ones give 256). The operations on flat buffers widen as they go, a
tile at a time, and are left as they are; the MLP is made of narrow operations (`cllm_gpu.ops.reference.mlp`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable
from typing import Any

from cllm_gpu.ops.precision import BFLOAT16
from cllm_gpu.ops.reference.mlp import backward_of, forward_of
from cllm_gpu.ops.reference.rounding import widened
from cllm_gpu.ops.reference.score_bias import ScoreTermGradients, ScoreTerms
from cllm_gpu.ops.specification import Operation, Specification


def in_bfloat16(operations: Iterable[Specification]) -> dict[str, Operation]:
    """The reference functions by name, taking bfloat16 arrays wherever they take float32."""
    narrow = {each.name: each.reference if each.flat else _rounding_once(each) for each in operations}
    narrow["mlp_forward"] = forward_of(narrow["linear_forward"], narrow["gelu_forward"])
    narrow["mlp_backward"] = backward_of(narrow["linear_backward"], narrow["gelu_backward"])
    return narrow


def _rounding_once(specification: Specification) -> Operation:
    function, written = specification.reference, specification.writes
    signature = inspect.signature(function)

    @functools.wraps(function)
    def operation(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        arrays = _Widened()
        wide = {name: arrays.take(value, write=name in written) for name, value in bound.arguments.items()}
        result = function(**wide)
        arrays.round()
        return result

    return operation


class _Widened:
    """float32 copies of the bfloat16 arrays of one call; an array that is there twice has one copy."""

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], Any] = {}
        self._written: list[tuple[Any, Any]] = []

    def take(self, value: Any, *, write: bool) -> Any:
        """`value` in float32 where it is bfloat16; of score terms and their gradients, every array."""
        if isinstance(value, ScoreTerms | ScoreTermGradients):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return type(value)(**{name: self.take(field, write=write) for name, field in fields.items()})
        if not (hasattr(value, "dtype") and value.dtype == BFLOAT16):
            return value
        place = (value.__array_interface__["data"], value.shape, value.strides)
        copy = self._copies.setdefault(place, widened(value))
        if write:
            self._written.append((value, copy))
        return copy

    def round(self) -> None:
        """The copies that were written to go back, each number to its nearest."""
        for value, copy in self._written:
            value[...] = copy
