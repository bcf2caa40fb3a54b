"""Recompute levels on a card: a training run has the same bits at each of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cllm_gpu.backend import get_backend
from cllm_gpu.model.activations import Activations
from cllm_gpu.model.recompute import Recompute
from cllm_gpu.ops.precision import Precision
from tests.gpu.training_runs import BATCH, LENGTH, Run, tiny_architecture
from tests.ops.cuda.devices import simulator_or_skip

STEPS = {"simulator": 2, "cupy": 20}
EPILOGUE_RELATIVE = 2.0**-8
"""Of a loss: cuBLASLt's GELU sees numbers before they are rounded to bf16; what is computed again sees them after."""


def _run(name: str, precision: Precision, level: Recompute) -> tuple[list[float], Run]:
    if name == "simulator":
        simulator_or_skip()
    backend = get_backend(name, precision=precision)
    run = Run(backend, tiny_architecture(positions="rope"))
    run.activations = Activations(
        run.architecture, backend, BATCH, LENGTH, backend.dtype, training=True, recompute=level
    )  # fmt: skip
    return [run.step() for _ in range(STEPS[name])], run


@pytest.mark.parametrize("level", ["pointwise", "block"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["simulator", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_a_run_has_the_same_bits(
    name: str, precision: Precision, level: Recompute, within: Callable[[str, float, float], None]
) -> None:
    (want, first), (got, second) = _run(name, precision, "none"), _run(name, precision, level)
    if (name, precision, level) == ("cupy", "bf16", "pointwise"):
        within("losses", max(abs(a - b) / b for a, b in zip(got, want, strict=True)), EPILOGUE_RELATIVE)
        return
    assert got == want
    for a, b in zip(first.flats, second.flats, strict=True):
        assert np.array_equal(first.backend.to_host(a), second.backend.to_host(b))
