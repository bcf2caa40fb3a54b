"""Numerical extremes: every run ends with finite weights saved, or with one line; what was sound before stays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import get_backend
from cllm_gpu.checkpoint.checkpoint import load_checkpoint
from cllm_gpu.config import Config, ModelConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from cllm_gpu.data import Dataset, open_dataset
from cllm_gpu.training.host_step import HostStep
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.errors import UserError

SETTINGS: list[dict[str, Any]] = [
    {},
    *({"rate": rate} for rate in (1e-45, 1e-37, 1.0, 1e5, 1e20, 1e30, 1e37, 1e38, 3.4e38, 1e39, math.inf, math.nan)),
    *({"epsilon": epsilon} for epsilon in (1e-300, 1e-50, 1e-45, 1.2e-38, 1e-30, 1.0, 1e38)),
    *({"beta1": beta} for beta in (0.0, 1 - 1e-7, 1 - 1e-12, math.nan)),
    *({"beta2": beta} for beta in (0.0, 1 - 1e-7, 1 - 1e-12)),
    *({"momentum": momentum} for momentum in (0.0, 1 - 1e-7, 1 - 1e-12)),
    *({"clip_norm": norm} for norm in (0.0, 1e-37, 1e-45, 1e19, 3e38, math.inf)),
    *({"weight_decay": decay} for decay in (1e3, 1e19, 1e30, 3e38)),
    *({"rate": 1e30, "clip_norm": 0.0, "weight_decay": decay} for decay in (0.0, 1e10)),
]
GRADIENTS = (None, 1e10, 1e30, math.nan, math.inf)
"""What the gradients of a random step are made to hold; None: as they are."""
STEPS = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("".join(f"{i} squared is {i * i}\n" for i in range(300)), encoding="utf-8")
    return open_dataset(
        str(folder / "text.txt"), tokenizer="bytes", validation_fraction=0.1, seed=1,
        cache_folder=folder / "cache", context=8,
    )  # fmt: skip


def _cases() -> Iterator[tuple[str, str, dict[str, Any], float | None]]:
    for precision, name, settings in itertools.product(("fp32", "bf16"), ("sgd", "adam", "adamw"), SETTINGS):
        for gradient in GRADIENTS if not settings or "clip_norm" in settings else GRADIENTS[:1]:
            yield precision, name, settings, gradient


def _config(precision: Any, name: Any, settings: dict[str, Any]) -> Config:
    return Config(
        model=ModelConfig(layers=1, heads=2, width=8, context=8, attention="standard"),
        optimizer=OptimizerConfig(name=name, **settings),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
        training=TrainingConfig(
            steps=STEPS, batch=2, evaluate_every=0, evaluation_batches=1, checkpoint_every=1, sample_tokens=0,
            maximum_skipped=3, spike_window=0, keep_last=1,
        ),
        precision=precision,
    )  # fmt: skip


def _spoil(trainer: Trainer, gradient: float, step: int) -> None:
    """The gradients of one step hold `gradient` in one place."""
    host = trainer.step
    assert isinstance(host, HostStep)
    computed = host.loss_and_gradients

    def spoilt(number: int) -> float:
        loss = computed(number)
        if number == step:
            trainer.gradients.flat[7] = gradient
        return loss

    host.loss_and_gradients = spoilt  # type: ignore[method-assign]


def _fault(folder: Path, dataset: Dataset, case: tuple[str, str, dict[str, Any], float | None], step: int) -> str:
    """What fell short in one case; empty if nothing did."""
    precision, name, settings, gradient = case
    try:
        config = _config(precision, name, settings)
    except UserError as error:
        return "" if "\n" not in str(error) else f"more than a line: {error}"
    backend = get_backend("numpy", workers=1, precision=config.precision)
    trainer = Trainer(config, backend, dataset, folder=folder)
    try:
        trainer.initialise()
        if gradient is not None:
            _spoil(trainer, gradient, step)
        trainer.train()
    except UserError as error:
        if "\n" in str(error):
            return f"more than a line: {error}"
    finally:
        trainer.close()
    arrays = [trainer.optimizer.weights(trainer.parameters).flat, *(x.flat for x in trainer.optimizer.state.values())]
    if not all(np.isfinite(array.astype(np.float64)).all() for array in arrays):
        return "weights or moments are not finite"
    load_checkpoint(folder)  # which refuses what is not finite
    return ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numerical_extremes(tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    rng, cases, faults = np.random.default_rng(13), list(_cases()), []
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            fault = _fault(folder, dataset, case, int(rng.integers(STEPS)))
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        if fault:
            faults.append(f"{case}: {fault}")
    print(f"numerical extremes: {len(cases)} tried, {len(faults)} fell short")
    assert not faults, "\n".join(faults)
