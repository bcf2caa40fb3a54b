"""Every operation gives the same bits every time: 1000 runs on a GPU, two on the simulator.

Before each run what it writes is poisoned and what it updates is put back, so an element that is left out, or that is
read before it is written, shows as a difference too.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.kernels.cases import DTYPES, LARGE, SMALL, BoundCase
from bench.kernels.operation_cases import NAMES, cuda_side, make_case
from tests.ops.cuda.devices import Device

REPEATS = 1000


def _bits(xp: Any, x: Any) -> Any:
    """A flat uint8 array of an array's or a number's bits."""
    return xp.ascontiguousarray(xp.asarray(x)).reshape(-1).view("uint8")


def differing_runs(xp: Any, bound: BoundCase, repeats: int) -> int:
    """How many of `repeats` runs differ in any bit from the first. The count stays on the device until the end."""
    first: dict[str, Any] = {}
    different: Any = xp.zeros((), dtype=xp.int64)
    for _ in range(repeats):
        bound.reset()
        bound.call()
        found = {name: _bits(xp, x) for name, x in bound.results().items()}
        if not first:
            first = {name: bits.copy() for name, bits in found.items()}
        unequal = xp.zeros((), dtype=bool)
        for name, bits in found.items():
            unequal |= (bits != first[name]).any()
        different += unequal
    return int(different)


@pytest.mark.parametrize("storage", list(DTYPES))
@pytest.mark.parametrize("name", NAMES)
def test_equal_bits_at_every_run(device: Device, name: str, storage: str) -> None:
    on_gpu = device.launcher.xp.__name__ == "cupy"
    case = make_case(name, storage, LARGE if on_gpu else SMALL)
    bound = BoundCase(case, cuda_side(case, device.launcher), device.put)
    repeats = REPEATS if on_gpu else 2
    different = differing_runs(device.launcher.xp, bound, repeats)
    assert different == 0, f"{name} ({storage}): {different} of {repeats} runs have other bits than the first"


def test_a_run_with_other_bits_is_counted() -> None:
    import numpy as np

    calls = []

    def sometimes_wrong(x: Any, weight: Any, bias: Any, out: Any) -> None:
        calls.append(1)
        out[...] = bias
        if len(calls) == 3:
            out.reshape(-1)[7] = np.nextafter(out.reshape(-1)[7], np.float32(np.inf))

    bound = BoundCase(make_case("linear_forward", "float32", SMALL), sometimes_wrong, np.copy)
    assert differing_runs(np, bound, 5) == 1


def test_what_is_left_unwritten_is_not_a_number() -> None:
    import numpy as np

    bound = BoundCase(make_case("linear_forward", "float32", SMALL), lambda *arguments: None, np.copy)
    bound.reset()
    bound.call()
    assert np.isnan(bound.results()["out"]).all()
