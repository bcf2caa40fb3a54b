"""An update rule of one's own: a class and a name, and it trains, resumes and is told of, wherever steps run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from cllm_gpu.backend import get_backend
from cllm_gpu.checkpoint.checkpoint import load_checkpoint
from cllm_gpu.config import Config, OptimizerConfig
from cllm_gpu.ops.reference.rounding import subtract
from cllm_gpu.optim.optimizer import RULES
from cllm_gpu.optim.update_rule import UpdateArrays, UpdateRule
from cllm_gpu.training.host_step import HostStep
from cllm_gpu.training.memory_plan import plan_memory
from cllm_gpu.training.metrics import read_metrics
from cllm_gpu.training.reporter import Silent
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.compiler import find_compiler

MakeTrainer = Callable[..., Trainer]
STEPS = 8


class SignSGD(UpdateRule):
    """u = β1·u + (1 − β1)·g;  p −= rate·(sign(u) + weight_decay·p)."""

    @classmethod
    def state_names(cls, config: OptimizerConfig) -> tuple[str, ...]:
        return ("momentum",)

    def step(self, ops: Any, arrays: UpdateArrays, *, rate: float, step: int, gradient_scale: float) -> float:
        momentum, beta = arrays.state["momentum"], self.config.beta1
        momentum *= beta
        momentum += (1.0 - beta) * gradient_scale * arrays.gradients.astype(momentum.dtype)
        update = np.sign(momentum)
        update[: arrays.decayed] += self.config.weight_decay * arrays.weights[: arrays.decayed]
        update *= rate
        subtract(np, arrays.weights, arrays.copy, slice(0, update.size), update, arrays.rounding)
        return float(np.sum(np.square(update, dtype=np.float64)))


class Messages(Silent):
    """A reporter that keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def own(config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run with the rule; no spikes are watched for, so that nothing else keeps steps from running ahead."""
    monkeypatch.setitem(RULES, "sign_sgd", SignSGD)
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, name="sign_sgd", rate=2e-3),
        training=dataclasses.replace(
            config.training, steps=STEPS, spike_window=0, evaluate_every=0, evaluation_batches=1, checkpoint_every=0
        ),
    )


@pytest.mark.parametrize(("name", "precision"), [("numpy", "fp32"), ("numpy", "bf16"), ("simulator", "fp32")])
def test_it_trains(make_trainer: MakeTrainer, own: Config, tmp_path: Path, name: str, precision: Any) -> None:
    if name == "simulator" and find_compiler() is None:
        pytest.skip("not run: the simulator needs a C++ compiler")
    own, reporter = dataclasses.replace(own, precision=precision), Messages()
    backend = get_backend(name, workers=1, precision=precision)
    trainer = make_trainer(own, tmp_path, backend=backend, reporter=reporter)
    trainer.train()
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "step"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5
    assert isinstance(trainer.step, HostStep)
    on_device = [line for line in reporter.messages if "the optimizer sign_sgd (it has no step on the device)" in line]
    assert len(on_device) == (name == "simulator")
    plan = plan_memory(own, trainer.architecture, backend)
    assert plan.optimizer == (1 + (precision == "bf16")) * trainer.layout.widened().bytes


def test_stopped_and_resumed_equals_uninterrupted(make_trainer: MakeTrainer, own: Config, tmp_path: Path) -> None:
    """Its state goes through the checkpoint by its name."""
    whole = make_trainer(own)
    whole.train()
    shorter = dataclasses.replace(own.training, checkpoint_every=3)
    first = make_trainer(dataclasses.replace(own, training=shorter), tmp_path)
    for _ in range(3):
        first._one_step()
    first._checkpoint(best=False)
    second = make_trainer(own, tmp_path)
    second.restore(load_checkpoint(tmp_path))
    assert set(load_checkpoint(tmp_path).optimizer) == {"momentum"}
    second.train()
    assert np.array_equal(whole.parameters.flat, second.parameters.flat)
    assert np.array_equal(whole.optimizer.state["momentum"].flat, second.optimizer.state["momentum"].flat)


def test_the_configuration_names_every_rule() -> None:
    ours = {name for name, rule in RULES.items() if rule.__module__.startswith("cllm_gpu.")}
    assert set(get_args(get_type_hints(OptimizerConfig)["name"])) == ours
