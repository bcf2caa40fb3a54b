"""A small run to train in tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cllm_gpu.backend import Backend
from cllm_gpu.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from cllm_gpu.data import Dataset, open_dataset
from cllm_gpu.training.host_step import HostStep
from cllm_gpu.training.trainer import Trainer

TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n\n\n" for i in range(200))


def host_step(trainer: Trainer) -> HostStep:
    """The step of a trainer whose steps the host takes part in."""
    assert isinstance(trainer.step, HostStep)
    return trainer.step


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A few kilobytes of text, byte tokens."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "functions.txt").write_text(TEXT, encoding="utf-8")
    return open_dataset(
        str(folder / "functions.txt"),
        tokenizer="bytes",
        validation_fraction=0.1,
        seed=1,
        cache_folder=folder / "cache",
        context=24,
    )


@pytest.fixture
def config() -> Config:
    """Everything that has state is switched on: dropout, momentum of every kind, warmup, clipping, the spike guard."""
    return Config(
        model=ModelConfig(layers=2, heads=2, width=32, context=24, dropout=0.1),
        data=DataConfig(),
        optimizer=OptimizerConfig(rate=3e-3, weight_decay=0.1),
        schedule=ScheduleConfig(name="cosine", warmup_steps=3, minimum_rate=1e-4),
        training=TrainingConfig(
            steps=12,
            batch=6,
            micro_batch=3,
            evaluate_every=4,
            evaluation_batches=2,
            checkpoint_every=5,
            spike_window=6,
            spike_deviations=50.0,
        ),
    )


@pytest.fixture
def make_trainer(backend: Backend, dataset: Dataset) -> Iterator[Callable[..., Trainer]]:
    """make_trainer(config, folder=None, …): an initialised trainer, closed after the test."""
    made: list[Trainer] = []

    def make(config: Config, folder: Path | None = None, **arguments: Any) -> Trainer:
        chosen = {"dataset": dataset, "backend": backend} | arguments
        trainer = Trainer(config, chosen.pop("backend"), chosen.pop("dataset"), folder=folder, **chosen)
        trainer.initialise()
        made.append(trainer)
        return trainer

    yield make
    for trainer in made:
        trainer.close()
