"""The fused operations on the simulator (everywhere a C++ compiler is) and on CuPy (where a GPU is)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ops.cuda.devices import Device, cupy_device, simulator_device


@pytest.fixture(scope="session", params=["simulator", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """Every test of an operation runs on each of these."""
    return cupy_device() if request.param == "cupy" else simulator_device()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
