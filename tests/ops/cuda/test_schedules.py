"""The kernels' results do not depend on the order in which threads run, and break none of CUDA's rules."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.simulator.launch import Schedule
from cllm_gpu.simulator.settings import settings
from tests.ops.cuda.devices import Device, simulator_device
from tests.ops.cuda.every_option import Results, run_everything

SCHEDULES = 20
STORAGE = pytest.mark.parametrize("storage", ["float32", "bfloat16"])


def _differing(one: Results, other: Results) -> list[str]:
    """Names of the results whose bits differ."""
    assert one.keys() == other.keys()
    return [name for name, x in one.items() if x.tobytes() != other[name].tobytes()]


@pytest.mark.parametrize("storage", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_equal_bits_under_many_schedules(storage: str) -> None:
    """Random orders of warps and lanes, copies made at the issue and at the wait."""
    device = simulator_device()
    first = run_everything(device, storage)
    assert all(np.isfinite(x.astype(np.float64)).all() for x in first.values())
    for seed in range(1, SCHEDULES + 1):
        with settings(schedule=Schedule(seed=seed, lazy_copies=seed % 2 == 0)):
            assert _differing(first, run_everything(device, storage)) == [], f"schedule {seed}"


@STORAGE
def test_no_rule_is_broken(storage: str) -> None:
    """Every access checked: ranges, alignment, races, reads of what was never written, divergent barriers."""
    with settings(check=True):
        run_everything(simulator_device(), storage)


@STORAGE
def test_equal_bits_at_every_run(device: Device, storage: str) -> None:
    first = run_everything(device, storage)
    assert _differing(first, run_everything(device, storage)) == []
