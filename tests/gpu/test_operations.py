"""Every CUDA operation against the reference in float64 on the same device; larger operands on a GPU.

bound = growth·eps(float32)·largest value + with bf16 operands, roundings·2^-8·largest value. Both factors, and why, are
in bench/kernels/operation_cases.py; tests/ops/cuda holds the tighter bounds at small sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.kernels.cases import DTYPES, LARGE, ODD, SMALL, BoundCase, Case, Sizes
from bench.kernels.operation_cases import NAMES, OTHER_METHODS, cuda_side, make_case
from cllm_gpu.ops.cuda.attention import METHOD, METHODS
from cllm_gpu.ops.registry import OPERATIONS, operations_on
from tests.ops.cuda.devices import Device

EPSILON = 2.0**-23
HALF_ULP = 2.0**-8


def _upcast(case: Case) -> Case:
    """The same case with float64 operands."""
    floating = (np.dtype(np.float32), DTYPES["bfloat16"])
    operands = {name: x.astype(np.float64) if x.dtype in floating else x for name, x in case.operands.items()}
    return Case(case.name, operands, case.written, case.updated, case.options)


def check_case(device: Device, case: Case, *, storage: str) -> None:
    """Run `case` as CUDA kernels and as the reference on one device; every result within the case's bound."""
    xp = device.launcher.xp
    ours = BoundCase(case, cuda_side(case, device.launcher), device.put)
    exact = BoundCase(_upcast(case), lambda *a, **o: OPERATIONS[case.name].reference(xp, *a, **o), device.put)
    for bound in (ours, exact):
        bound.reset()
        bound.call()
    got, want = ours.results(), exact.results()
    assert got.keys() == want.keys()
    assert got, f"{case.name} gives nothing to compare"
    for name in got:
        _compare(f"{case.name}: {name}", xp, got[name], want[name], case, storage)


def _compare(what: str, xp: Any, got: Any, want: Any, case: Case, storage: str) -> None:
    ours, theirs = xp.asarray(got).astype(np.float64), xp.asarray(want).astype(np.float64)
    assert ours.shape == theirs.shape, what
    largest = max(case.least, float(abs(theirs).max()))
    relative = 1e-5 if _is_sum(what) else case.growth * EPSILON
    if storage == "bfloat16":
        relative += case.roundings * 1.01 * HALF_ULP
    error = float(abs(ours - theirs).max())
    print(f"{what} {storage}: error {error:.3g}, bound {relative * largest:.3g}")
    if not (error <= relative * largest):
        pytest.fail(f"{what} ({storage}): error {error:.3g} is above {relative * largest:.3g}")


def _is_sum(what: str) -> bool:
    """A squared norm: float32 updates squared and summed, so its relative error is some float32 roundings."""
    return what.endswith(": value") and not what.startswith("attention")


@pytest.mark.parametrize("storage", list(DTYPES))
@pytest.mark.parametrize("sizes", [SMALL, ODD], ids=["small", "odd"])
@pytest.mark.parametrize("name", NAMES)
def test_operation_against_the_reference(device: Device, name: str, sizes: Sizes, storage: str) -> None:
    check_case(device, make_case(name, storage, sizes), storage=storage)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", list(DTYPES))
@pytest.mark.parametrize("name", NAMES)
def test_large_operation_against_the_reference(name: str, storage: str) -> None:
    from tests.ops.cuda.devices import cupy_device

    check_case(cupy_device(), make_case(name, storage, LARGE), storage=storage)


def test_every_operation_has_a_case() -> None:
    for name in operations_on("cuda"):
        case = make_case(name, "float32", SMALL)
        assert case.name == name


def test_every_way_of_the_attention_backward_has_a_case() -> None:
    others = {options["method"] for name, options in OTHER_METHODS.values() if name == "attention_backward"}
    assert others | {METHOD} == set(METHODS)


@pytest.mark.parametrize("damaged", ["gelu_forward", "layernorm_backward", "attention_forward"])
def test_a_wrong_result_is_found(damaged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: the reference with one element of one result changed does not pass for a kernel's."""
    reference = OPERATIONS[damaged].reference

    def wrong(launcher: Any, *arguments: Any, **options: Any) -> None:
        reference(launcher.xp, *arguments, **options)
        out = arguments[{"gelu_forward": 2, "layernorm_backward": 7, "attention_forward": 3}[damaged]]
        out.reshape(-1)[5] += 0.05 * abs(out).max()

    monkeypatch.setattr(f"cllm_gpu.ops.cuda.{OPERATIONS[damaged].module}.{damaged}", wrong)
    launcher: Any = type("NumPyOnly", (), {"xp": np})()
    with pytest.raises(pytest.fail.Exception, match="is above"):
        check_case(Device(launcher, np.copy, np.asarray), make_case(damaged, "float32", SMALL), storage="float32")
