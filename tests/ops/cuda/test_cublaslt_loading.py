"""Loading cuBLASLt: the line that says who computes products, and the stand-in beside the binding it stands for."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.cuda import cublaslt
from cllm_gpu.ops.cuda.cublaslt import GELU_GENERATIONS, load_cublaslt
from cllm_gpu.ops.cuda.cupy_launcher import gpu_launcher
from cllm_gpu.ops.cuda.epilogue import Epilogue
from cllm_gpu.utils.errors import UserError
from tests.ops.cuda import lt_stand_in
from tests.ops.cuda.devices import BFLOAT16
from tests.ops.cuda.lt_stand_in import StandIn


class _Cupy:
    """As much of CuPy as a launcher asks for."""

    def __init__(self, generation: int) -> None:
        self.RawModule, self.cuda, self.runtime = None, self, self
        self.generation, self.id = generation, 0

    def Device(self) -> Any:  # noqa: N802 (CuPy's name)
        return self

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        return {"major": self.generation}


def test_without_nvmath_the_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt.importlib.util, "find_spec", lambda name: None)
    launcher, line = gpu_launcher(_Cupy(9))
    assert launcher.lt is None
    assert line == (
        "matrix products by cuBLAS gemmEx, without epilogues (nvmath-python is not installed; it comes with the extras "
        "cuda12 and cuda13)"
    )


def _install(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(cublaslt.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cublaslt.importlib.metadata, "version", lambda name: "1.0.0")
    monkeypatch.setitem(sys.modules, "nvmath", module)
    monkeypatch.setitem(sys.modules, "nvmath.bindings", module)
    monkeypatch.setitem(sys.modules, "nvmath.bindings.cublasLt", module)


def test_with_nvmath_the_line_names_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, StandIn())
    launcher, line = gpu_launcher(_Cupy(9))
    assert line == "matrix products by cuBLASLt 12.9.3 by nvmath-python 1.0.0"
    assert launcher.lt is not None
    arrays = [np.zeros(s, BFLOAT16) for s in ((2, 4), (2, 8), (8,), (2, 8))]
    for generation in (8, 9, 10, 12):
        lt = load_cublaslt(generation)
        assert lt.takes(arrays[0], arrays[1], Epilogue("gelu", *arrays[2:])) == (generation in GELU_GENERATIONS)


def test_an_nvmath_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = StandIn()

    def create() -> int:
        raise lt_stand_in.LtError("the library was not initialized\nand more")

    broken.create = create  # type: ignore[method-assign]
    _install(monkeypatch, broken)
    with pytest.raises(UserError, match=r"^nvmath-python does not start: LtError: the library was not initialized$"):
        load_cublaslt(9)


def test_the_stand_in_is_like_the_binding() -> None:
    """Names, parameters, numbers and dtypes. Not run, or with CLLM_REQUIRE_NVMATH=1 failed, without nvmath-python."""
    if importlib.util.find_spec("nvmath") is None:
        if os.environ.get("CLLM_REQUIRE_NVMATH") == "1":
            pytest.fail("CLLM_REQUIRE_NVMATH=1, and nvmath-python is not installed")
        pytest.skip("not run: nvmath-python is not installed (it comes with the extra test on Linux)")
    binding = importlib.import_module("nvmath.bindings.cublasLt")
    functions = [n for n, f in vars(StandIn).items() if inspect.isfunction(f) and not n.startswith("_")]
    assert len(functions) == 14
    for name in functions:
        ours = list(inspect.signature(getattr(StandIn(), name)).parameters)
        assert ours == list(inspect.signature(getattr(binding, name)).parameters), name
    for name in ("Epilogue", "ReductionScheme", "MatmulDescAttribute", "MatmulPreferenceAttribute"):
        for member in getattr(StandIn, name):
            assert getattr(binding, name)[member.name] == member, member
    for ours, attributes in (
        ("matmul_desc", "MatmulDescAttribute"),
        ("matmul_preference", "MatmulPreferenceAttribute"),
    ):
        for attribute in getattr(StandIn, attributes):
            dtypes = [getattr(side, f"get_{ours}_attribute_dtype")(attribute) for side in (StandIn(), binding)]
            assert np.dtype(dtypes[0]) == np.dtype(dtypes[1]), attribute
    assert np.dtype(binding.matmul_heuristic_result_dtype) == lt_stand_in.RESULT_DTYPE
    assert np.dtype(binding.matmul_algo_dtype) == lt_stand_in.ALGORITHM_DTYPE
    assert issubclass(binding.cuBLASLtError, Exception)
