"""Training steps that run ahead of the host, captured as a graph: the bits of the same steps launched one by one."""

from __future__ import annotations

import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.config import TrainingConfig
from cllm_gpu.devices.logit_chunks import LogitChunks
from cllm_gpu.ops.precision import Precision
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.training.graph_step import GraphStep
from cllm_gpu.training.loss_guard import LossGuard
from cllm_gpu.training.step import StepContext, StepResult
from tests.gpu.training_runs import BATCH, LENGTH, Run, tiny_architecture
from tests.ops.cuda.devices import simulator_or_skip

STEPS = {"simulator": 4, "cupy": 40}


class _Steps(Run):
    """A run whose steps are issued ahead of their results."""

    def compute(
        self, tokens: Any, targets: Any, gradients: Any, *, order: Any, dropout: Dropout | None, **named: Any
    ) -> Any:
        self.activations.token_order = order
        self.model.compute_gradients(self.activations, tokens, targets, gradients, dropout=dropout, **named)
        return self.activations.losses

    def batch(self, step: int) -> tuple[Any, Any]:
        """Drawn in the order of the steps."""
        draws = self.generator.zipf(1.5, (2 * BATCH, LENGTH + 1)) % self.architecture.vocabulary
        tokens, targets = (np.ascontiguousarray(x, np.int32) for x in (draws[:, :-1], draws[:, 1:]))
        return tokens, targets

    def run(self, steps: int, *, capture: bool) -> list[StepResult]:
        """Two micro-batches a step, with dropout."""
        batches: Any = SimpleNamespace(context=LENGTH, batch=self.batch)
        context = StepContext(
            loop=TrainingConfig(batch=2 * BATCH, micro_batch=BATCH, seed=7, capture=capture),
            model=self.model,
            optimizer=self.optimizer,
            gradients=self.gradients,
            batches=batches,
            rate=lambda step: 3e-3 / (1 + step),
            guard=LossGuard(maximum_skipped=5, spike_window=0, spike_deviations=1.0),
        )
        self.graph_step = GraphStep(context, self.compute, print)
        results = []
        for step in range(steps):
            self.graph_step.issue(step)
            if step:
                results.append(self.graph_step.take())
        return [*results, self.graph_step.take()]


def _backend(name: str, precision: Precision) -> Backend:
    if name == "simulator":
        simulator_or_skip()
    return get_backend(name, precision=precision)


@pytest.mark.parametrize(("precision", "wide", "rows"), [("bf16", True, 96), ("bf16", False, 20), ("fp32", False, 20)])
@pytest.mark.parametrize("name", ["simulator", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_a_replayed_step_is_the_step(name: str, precision: Precision, wide: bool, rows: int) -> None:
    """Also under a graph nothing may depend on what else the device was doing. `rows` of logits in a chunk."""
    runs = []
    for capture in (True, False):
        backend = dataclasses.replace(_backend(name, precision), logit_chunks=LogitChunks(1 << 30, rows))
        run = _Steps(backend, tiny_architecture(dropout=0.1), wide_gradients=wide)
        results = run.run(STEPS[name], capture=capture)
        assert (run.activations["head"].dhead is not None) is (precision == "bf16" and not wide)
        runs.append((run, results))
    (replayed, ours), (launched, theirs) = runs
    refused = replayed.graph_step.capture_refused
    if name == "cupy" and importlib.util.find_spec("nvmath") is None:
        assert refused is not None, "cuBLAS through CuPy cannot be captured"
    else:
        assert refused is None
        assert replayed.graph_step.captured
    assert not launched.graph_step.captured
    assert ours == theirs
    assert ours[-1].loss < ours[0].loss - 0.01, "the run learns nothing, so it proves nothing"
    for a, b in zip(replayed.flats, launched.flats, strict=True):
        assert np.array_equal(replayed.backend.to_host(a), launched.backend.to_host(b))
