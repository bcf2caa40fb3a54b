"""The fused operations on the simulator (everywhere a C++ compiler is) and on CuPy (where a GPU is)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cllm_gpu.compiler import find_compiler
from cllm_gpu.fused.launcher import Launcher
from cllm_gpu.simulator import RawModule

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}


@dataclass(frozen=True)
class Device:
    """A launcher and the way to and from its arrays."""

    launcher: Launcher
    put: Callable[[Any], Any]
    get: Callable[[Any], np.ndarray[Any, Any]]


def _cupy_module() -> Any:
    try:
        import cupy
    except ImportError:
        return None
    return cupy if cupy.is_available() else None


def _cupy_device() -> Device:
    cupy = _cupy_module()
    if cupy is None:
        if os.environ.get("CLLM_REQUIRE_GPU") == "1":
            pytest.fail("CLLM_REQUIRE_GPU=1, and there is no CuPy with a GPU")
        pytest.skip("no CuPy with a GPU")
    return Device(Launcher(cupy, cupy.RawModule), cupy.asarray, cupy.asnumpy)


@pytest.fixture(scope="session", params=["simulator", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Every test of an operation runs on each of these."""
    if request.param == "cupy":
        yield _cupy_device()
        return
    if find_compiler() is None:
        pytest.skip("the simulator needs a C++ compiler")
    yield Device(Launcher(np, RawModule), lambda x: np.array(x, copy=True), np.asarray)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
