"""The checker finds each planted defect, names its line, and has nothing to say about the sound kernel."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from cllm_gpu.simulator import KernelError, RawModule, Schedule
from tests.simulator.defects import DEFECTS, Defect

CUDA = Path(__file__).parents[2] / "cuda"
CASES = pytest.mark.parametrize("number", range(len(DEFECTS)), ids=[d.name.replace(" ", "-") for d in DEFECTS])


@functools.cache
def _module(defective: bool) -> RawModule:
    """All kernels in one source, each with lines counted from 1 in a file of its own name."""
    parts = []
    for i, defect in enumerate(DEFECTS):
        source = defect.defective() if defective else defect.sound()
        parts.append(f'#line 1 "defect_{i}.cu"\n' + source.replace("void kernel(", f"void kernel_{i}("))
    return RawModule(code="\n".join(parts), options=(f"-I{CUDA}",), check=True)


def _run(number: int, defective: bool, schedule: Schedule) -> np.ndarray:
    defect: Defect = DEFECTS[number]
    x = np.linspace(1, 2, defect.n, dtype=np.float32)
    y = np.zeros_like(x)
    kernel = _module(defective).get_function(f"kernel_{number}")
    kernel((defect.grid,), (defect.block,), (x, y, defect.n), shared_mem=defect.shared_mem, schedule=schedule)
    return y


@CASES
def test_defect_is_found(number: int) -> None:
    defect = DEFECTS[number]
    with pytest.raises(KernelError) as caught:
        _run(number, True, Schedule())
    message = str(caught.value)
    assert caught.value.kind in defect.kind.split("|"), message
    assert defect.words in message
    assert f"kernel kernel_{number}, line " in message
    assert "\n" not in message
    assert caught.value.line > 0, message
    if defect.line_of:
        lines = defect.defective().split("\n")
        assert defect.line_of in lines[caught.value.line - 1], message


@CASES
def test_defect_is_found_in_any_order_of_threads(number: int) -> None:
    for seed in range(1, 6):
        with pytest.raises(KernelError) as caught:
            _run(number, True, Schedule(seed, lazy_copies=bool(seed % 2)))
        assert caught.value.kind in DEFECTS[number].kind.split("|"), str(caught.value)


@CASES
def test_sound_kernel_passes(number: int) -> None:
    first = _run(number, False, Schedule())
    for seed in range(1, 6):
        again = _run(number, False, Schedule(seed, lazy_copies=bool(seed % 2)))
        if "atomic" in DEFECTS[number].name:  # the order of a float atomic's additions is not fixed
            np.testing.assert_allclose(again, first, rtol=1e-5)
        else:
            assert again.tobytes() == first.tobytes()
