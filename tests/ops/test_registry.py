"""One registration an operation: every side has each under its name, with the reference's signature."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from cllm_gpu.ops import registry
from cllm_gpu.ops.reference.gelu import gelu_forward
from cllm_gpu.ops.registry import OPERATIONS, Operations, cuda_operations, implementation, reference_operations
from cllm_gpu.ops.specification import SIDES, operation
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.profiling import Ranges
from tests.strict_device import StrictModule

EVERYWHERE = [(side, name) for side in ("reference", *SIDES) for name in OPERATIONS]
ON_A_SIDE = [(side, name) for side, name in EVERYWHERE if side in ("reference", *OPERATIONS[name].sides)]
OWN_PARAMETERS = {("cuda", "attention_backward"): ["method"]}
"""What a side takes besides the reference's parameters: keyword-only, with a default, at the end."""


def _parameters(function: Any) -> list[tuple[Any, ...]]:
    """Name, kind and default of all after the first."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()][1:]


@pytest.mark.parametrize(("side", "name"), ON_A_SIDE)
def test_parameters_are_those_of_the_reference(side: Any, name: str) -> None:
    ours, theirs = _parameters(implementation(name, side)), _parameters(OPERATIONS[name].reference)
    assert ours[: len(theirs)] == theirs
    own = ours[len(theirs) :]
    assert [name for name, *_ in own] == OWN_PARAMETERS.get((side, name), [])
    assert all(kind is inspect.Parameter.KEYWORD_ONLY and default is None for _, kind, default in own)


@pytest.mark.parametrize(("side", "name"), [(side, name) for side, name in ON_A_SIDE if side != "reference"])
def test_only_the_reference_says_what_an_operation_does(side: Any, name: str) -> None:
    described = inspect.getdoc(OPERATIONS[name].reference)
    assert described
    assert (implementation(name, side).__doc__ or "").startswith("As the reference")


@pytest.mark.parametrize(("side", "name"), ON_A_SIDE)
def test_an_operation_stands_in_the_file_of_its_reference(side: Any, name: str) -> None:
    assert implementation(name, side).__module__ == f"cllm_gpu.ops.{side}.{OPERATIONS[name].module}"


@pytest.mark.parametrize(("side", "name"), sorted({*EVERYWHERE} - {*ON_A_SIDE}))
def test_what_is_left_to_the_reference_is_not_there(side: Any, name: str) -> None:
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        implementation(name, side)


def test_what_has_no_kernel_says_so_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else fails: a new operation may begin with its reference alone."""
    alone = dataclasses.replace(OPERATIONS["gelu_forward"], sides=())
    monkeypatch.setitem(registry.OPERATIONS, "gelu_forward", alone)
    launcher: Any = None
    with pytest.raises(UserError, match=r"^operation gelu_forward has no CUDA kernel: choose the backend native"):
        cuda_operations(launcher, Ranges()).gelu_forward(1, None, out=2)


def test_the_decorator_returns_the_function_itself() -> None:
    def double(xp: Any, x: Any) -> None:
        x *= 2

    assert operation(writes=("x",))(double) is double
    with pytest.raises(ValueError, match="double has no parameter y"):
        operation(writes=("x", "y"))(double)


def test_operations_are_bound_replaced_and_immutable() -> None:
    ops = reference_operations(StrictModule())
    assert ops.gelu_forward.func is gelu_forward  # type: ignore[attr-defined]

    def mine(*arguments: Any) -> None:
        pass

    changed = ops.replace(gelu_forward=mine)
    assert (changed.gelu_forward, changed.gelu_backward) == (mine, ops.gelu_backward)
    assert ops.gelu_forward is not mine
    with pytest.raises(AttributeError, match="no operation is called 'gelu_forwards'"):
        _ = ops.gelu_forwards
    with pytest.raises(AttributeError, match=r"replace\(gelu_forward=…\) gives a copy"):
        ops.gelu_forward = mine
    with pytest.raises(TypeError, match="not one function for each operation: gelu_forwards"):
        ops.replace(gelu_forwards=mine)
    with pytest.raises(TypeError, match="not one function for each operation: adam_step, "):
        Operations({})
