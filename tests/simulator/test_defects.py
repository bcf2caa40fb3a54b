"""The checker finds each planted defect, names its line, and has nothing to say about the sound kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cllm_gpu.simulator import KernelError, RawKernel, Schedule
from tests.simulator.defects import DEFECTS, Defect

CUDA = Path(__file__).parents[2] / "cuda"


def _run(defect: Defect, source: str, schedule: Schedule) -> np.ndarray:
    x = np.linspace(1, 2, defect.n, dtype=np.float32)
    y = np.zeros_like(x)
    kernel = RawKernel(source, "kernel", options=(f"-I{CUDA}",), check=True)
    kernel((defect.grid,), (defect.block,), (x, y, defect.n), shared_mem=defect.shared_mem, schedule=schedule)
    return y


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name.replace(" ", "-"))
def test_defect_is_found(defect: Defect) -> None:
    with pytest.raises(KernelError) as caught:
        _run(defect, defect.defective(), Schedule())
    message = str(caught.value)
    assert caught.value.kind in defect.kind.split("|"), message
    assert defect.words in message
    assert "kernel kernel, " in message
    assert "\n" not in message
    assert caught.value.line > 0, message
    if defect.line_of:
        lines = defect.defective().split("\n")
        assert defect.line_of in lines[caught.value.line - 1], message


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name.replace(" ", "-"))
def test_sound_kernel_passes(defect: Defect) -> None:
    first = _run(defect, defect.sound(), Schedule())
    for seed in range(1, 4):
        again = _run(defect, defect.sound(), Schedule(seed, lazy_copies=bool(seed % 2)))
        assert first.tobytes() == again.tobytes() or "sum without an atomic" in defect.name
