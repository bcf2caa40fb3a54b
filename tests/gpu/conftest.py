"""The devices these tests run on: the CUDA kernels on the simulator (small operands) and on a GPU."""

from __future__ import annotations

import pytest

from tests.ops.cuda.devices import Device, cupy_device, simulator_device


@pytest.fixture(scope="session", params=["simulator", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """Every test of an operation runs on each of these."""
    return cupy_device() if request.param == "cupy" else simulator_device()
