"""The operations on bfloat16 NumPy arrays: inputs are upcast to float32, outputs are rounded once.

NumPy itself would sum bfloat16 in bfloat16 (100,000 ones give 256). Operations on flat buffers upcast one tile at a
time themselves and are used as they are; the MLP is composed of bfloat16 operations (`cllm_gpu.ops.reference.mlp`).
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
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients
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
    """float32 copies of the bfloat16 arrays of one call; an array passed twice is copied once."""

    def __init__(self) -> None:
        self._copies: dict[tuple[Any, ...], Any] = {}
        self._written: list[tuple[Any, Any]] = []

    def take(self, value: Any, *, write: bool) -> Any:
        """`value` in float32 if it is bfloat16; for a score bias or its gradients, with every array converted."""
        if isinstance(value, ScoreBias | ScoreBiasGradients):
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
        """Write the modified copies back, rounded to nearest."""
        for value, copy in self._written:
            value[...] = copy
