"""What a look at a step finds on the kernels is what it finds on NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.training.diagnostics import Look
from tests.gpu.training_runs import Run, tiny_architecture
from tests.ops.cuda.devices import simulator_or_skip

RELATIVE = {"fp32": 1e-4, "bf16": 2.0**-5}
"""Of norms and largest elements after two steps: sums in another order. In bf16 a bias' gradient, a sum of terms that
cancel, each rounded by 2^-9, differs most: by 5e-3 on the simulator."""


def _record(backend: Backend) -> dict[str, Any]:
    run = Run(backend, tiny_architecture())
    run.step()
    look = Look(run.model, [run.activations], run.gradients, run.optimizer.weights(run.parameters))
    run.optimizer.apply(run.parameters, run.gradients, rate=3e-3, gradient_norm=1.0)
    return look.record(2, None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["simulator", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_a_look_says_what_it_says_on_numpy(
    within: Callable[[str, float, float], None], name: str, precision: Any
) -> None:
    if name == "simulator":
        simulator_or_skip()
    got, want = (_record(get_backend(which, workers=1, precision=precision)) for which in (name, "numpy"))
    worst = 0.0
    for parameter, found in want["parameters"].items():
        assert got["parameters"][parameter]["size"] == found["size"]
        for value in ("gradient", "weight", "update"):
            worst = max(worst, _difference(got["parameters"][parameter][value], found[value]))
    within(f"norms on {name} in {precision}", worst, RELATIVE[precision])
    for kind, values in want["activations"].items():
        for own, other in zip(got["activations"][kind], values, strict=True):
            within(f"largest {kind} on {name} in {precision}", _difference(own, other), RELATIVE[precision])


def _difference(got: float, want: float) -> float:
    return abs(got - want) / abs(want)
