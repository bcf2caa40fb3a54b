"""The loop: what one step does, what a run learns, and that it does the same again."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from cllm_gpu.data import open_dataset
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.errors import UserError
from tests.training.conftest import host_step

MakeTrainer = Callable[..., Trainer]


def with_sections(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with some names of some sections replaced."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_one_step_moves_every_parameter(make_trainer: MakeTrainer, config: Config, optimizer: str) -> None:
    # the position embedding has a row for every position of the batch, the token embedding only for bytes that occur
    config = with_sections(config, optimizer={"name": optimizer}, training={"steps": 1}, schedule={"warmup_steps": 0})
    trainer = make_trainer(config)
    before = {name: view.copy() for name, view in trainer.parameters.items()}
    trainer.train()
    for name, view in trainer.parameters.items():
        assert not np.array_equal(before[name], view), f"{name} did not move"
        assert np.isfinite(view).all()


def test_sgd_moves_by_exactly_minus_rate_times_gradient(make_trainer: MakeTrainer, config: Config) -> None:
    rate = 0.25  # a power of two: the product is exact
    config = with_sections(
        config,
        optimizer={
            "name": "sgd",
            "rate": rate,
            "lattice_rate": 1.0,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "clip_norm": 0.0,
        },
        schedule={"name": "constant", "warmup_steps": 0, "minimum_rate": 0.0},
        training={"steps": 1},
    )
    trainer = make_trainer(config)
    before = trainer.parameters.flat.copy()
    trainer.train()
    expected = before - np.float32(rate) * trainer.gradients.flat
    assert np.array_equal(trainer.parameters.flat, expected)
    assert np.count_nonzero(trainer.gradients.flat) > trainer.layout.count // 2


def test_micro_batches_add_up_to_the_whole_batch(
    make_trainer: MakeTrainer, config: Config, within: Callable[[str, float, float], None]
) -> None:
    gradients = []
    for micro in (6, 3, 2, 1):
        trainer = make_trainer(with_sections(config, training={"micro_batch": micro}))
        host_step(trainer).loss_and_gradients(0)
        gradients.append(trainer.gradients.flat.copy())
    norm = float(np.linalg.norm(gradients[0]))
    for other in gradients[1:]:
        # float32 sums of 144 rows in another order: eps·√144 of the norm, with room for the layers in between
        within("accumulated gradient", float(np.linalg.norm(other - gradients[0])) / norm, 1e-6 * 12)


def test_two_runs_of_one_seed_are_equal_bit_for_bit(make_trainer: MakeTrainer, config: Config) -> None:
    first, second = make_trainer(config), make_trainer(config)
    first.train()
    second.train()
    assert np.array_equal(first.parameters.flat, second.parameters.flat)
    other = make_trainer(with_sections(config, training={"seed": 2}))
    other.train()
    assert not np.array_equal(first.parameters.flat, other.parameters.flat)


def test_one_batch_is_learnt_by_heart(make_trainer: MakeTrainer, config: Config) -> None:
    config = with_sections(
        config,
        model={"dropout": 0.0, "width": 48},
        optimizer={"weight_decay": 0.0, "rate": 5e-3},
        schedule={"minimum_rate": 0.0, "name": "linear", "warmup_steps": 10},
        training={"steps": 300, "batch": 4, "micro_batch": None, "spike_window": 0, "evaluate_every": 0},
    )
    trainer = make_trainer(config)
    # random sequences with different first tokens: every target is determined by what stands before it
    both = np.random.default_rng(1).permutation(256)[: 4 * 25].reshape(4, 25).astype(np.int32)
    tokens, targets = both[:, :-1].copy(), both[:, 1:].copy()
    trainer.batches.batch = lambda step: (tokens, targets)  # type: ignore[method-assign]
    trainer.train()
    loss = host_step(trainer).loss_and_gradients(0)
    assert loss < 0.01, loss


@pytest.mark.slow
def test_patterns_are_learnt_completely(backend: Backend, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    config = Config(
        model=ModelConfig(layers=2, heads=2, width=64, context=32),
        data=DataConfig(source="patterns", tokenizer="patterns"),
        optimizer=OptimizerConfig(rate=5e-3),
        schedule=ScheduleConfig(name="cosine", warmup_steps=20),
        training=TrainingConfig(steps=300, batch=16, evaluate_every=0, evaluation_batches=10),
    )
    dataset = open_dataset(
        "patterns", tokenizer="patterns", validation_fraction=0.1, seed=1, cache_folder=tmp_path, context=32
    )
    outcome = make_trainer(config, dataset=dataset).train()
    assert outcome.evaluation is not None
    assert outcome.evaluation.accuracy > 0.99, outcome.evaluation


def test_memory_does_not_grow(make_trainer: MakeTrainer, config: Config) -> None:
    config = with_sections(
        config,
        model={"layers": 1, "width": 16, "context": 8},
        training={"steps": 260, "batch": 2, "micro_batch": None, "evaluate_every": 0, "evaluation_batches": 1},
    )
    trainer = make_trainer(config)
    tracemalloc.start()
    try:
        for _ in range(50):
            trainer._one_step()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(200):
            trainer._one_step()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # the interpreter's own caches may move by a little; one leaked record per step would be over 100 kB
    assert after - before < 20_000, f"{after - before} bytes more after 200 steps"


class Notes:
    """A reporter that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.messages: list[str] = []

    def step(self, record: dict[str, Any]) -> None:
        self.steps.append(record)

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_a_step_that_is_not_finite_is_skipped(make_trainer: MakeTrainer, config: Config) -> None:
    notes = Notes()
    trainer = make_trainer(config, reporter=notes)
    trainer._one_step()
    kept = trainer.parameters.flat.copy()
    moments = {name: state.flat.copy() for name, state in trainer.optimizer.state.items()}
    compute = trainer.workers.loss_and_gradients

    def poisoned(*arguments: Any, **named: Any) -> float:
        loss = compute(*arguments, **named)
        trainer.gradients["final_norm.weight"][3] = math.nan
        return loss

    trainer.workers.loss_and_gradients = poisoned  # type: ignore[method-assign]
    trainer._one_step()
    assert np.array_equal(trainer.parameters.flat, kept)
    assert all(np.array_equal(state.flat, moments[name]) for name, state in trainer.optimizer.state.items())
    assert trainer.guard.skipped == 1
    assert notes.steps[-1]["skipped"]
    assert notes.steps[-1]["update_norm"] == 0.0
    assert len(notes.messages) == 1
    assert "step 2" in notes.messages[0]
    trainer.workers.loss_and_gradients = compute  # type: ignore[method-assign]
    trainer._one_step()
    assert not np.array_equal(trainer.parameters.flat, kept)
    assert trainer.guard.skipped_in_a_row == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_training_stops_after_too_many_skipped_steps(
    make_trainer: MakeTrainer, config: Config, tmp_path: Path, workers: int
) -> None:
    config = with_sections(config, training={"maximum_skipped": 3, "steps": 50})
    trainer = make_trainer(config, tmp_path, backend=get_backend("numpy", workers=workers))
    trainer.parameters["final_norm.weight"][0] = math.inf
    with pytest.raises(UserError, match="3 steps in a row"):
        trainer.train()
    assert trainer.state.step == 3
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir()), "inf was saved"


def test_training_stops_where_the_optimizer_refuses_every_step(
    make_trainer: MakeTrainer, config: Config, tmp_path: Path
) -> None:
    """Loss and norm are finite, the gradient is too large to be squared: the weights stay, and so does the gradient."""
    settings = {"maximum_skipped": 3, "steps": 50}
    trainer = make_trainer(with_sections(config, training=settings, optimizer={"clip_norm": 0.0}), tmp_path)
    compute = trainer.workers.loss_and_gradients

    def huge(*arguments: Any, **named: Any) -> float:
        loss = compute(*arguments, **named)
        trainer.gradients["final_norm.weight"][3] = 1e25
        return loss

    trainer.workers.loss_and_gradients = huge  # type: ignore[method-assign]
    with pytest.raises(UserError, match="3 steps in a row skipped, the last because of a gradient too large"):
        trainer.train()
    assert trainer.state.step == 3
    assert list((tmp_path / "checkpoints").iterdir()), "the state was not saved"


def test_every_step_logs_rate_norm_and_update(make_trainer: MakeTrainer, config: Config) -> None:
    notes = Notes()
    make_trainer(config, reporter=notes).train()
    assert [record["step"] for record in notes.steps] == list(range(1, 13))
    for record in notes.steps:
        assert record["rate"] > 0
        assert record["gradient_norm"] > 0
        assert record["update_norm"] > 0
        assert record["tokens_per_second"] > 0
    assert notes.steps[0]["rate"] == pytest.approx(1e-3)
    assert notes.steps[2]["rate"] == pytest.approx(3e-3)


def test_ranges_name_every_phase_and_layer(
    backend: Backend, make_trainer: MakeTrainer, config: Config, tmp_path: Path
) -> None:
    names: list[str] = []
    open_now: list[str] = []

    class Domain:
        """Stands for nvtx's domain: records what is pushed and popped."""

        def get_event_attributes(self, *, message: str) -> str:
            return message

        def push_range(self, name: str) -> None:
            names.append(name)
            open_now.append(name)

        def pop_range(self) -> None:
            open_now.pop()

    from cllm_gpu.utils.profiling import Ranges

    recorded = dataclasses.replace(backend, ranges=Ranges(Domain()))
    make_trainer(with_sections(config, training={"steps": 1}), tmp_path, backend=recorded).train()
    assert open_now == []
    for phase in ("data", "forward", "loss", "backward", "optimizer", "evaluation", "checkpoint"):
        assert phase in names
    for layer in range(2):
        for part in ("attention", "mlp"):
            assert f"forward/block_{layer:02d}/{part}" in names
            assert f"backward/block_{layer:02d}/{part}" in names


def test_a_corpus_shorter_than_the_context_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc" * 10, encoding="utf-8")
    with pytest.raises(UserError, match="too few for a context of 64"):
        open_dataset(
            str(tmp_path / "short.txt"),
            tokenizer="bytes",
            validation_fraction=0.1,
            seed=1,
            cache_folder=tmp_path / "cache",
            context=64,
        )
