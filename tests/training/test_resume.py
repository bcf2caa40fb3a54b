"""A run that stops and goes on gives what a run gives that does not stop."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.checkpoint.checkpoint import load_checkpoint, newest_checkpoint
from cllm_gpu.config import Config
from cllm_gpu.data import Dataset
from cllm_gpu.model.architecture import LatticeTerms
from cllm_gpu.training.metrics import read_metrics
from cllm_gpu.training.step_timer import FIGURES
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.errors import UserError

MakeTrainer = Callable[..., Trainer]


def records(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock gave."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in FIGURES} for line in lines]


def same_state(first: Trainer, second: Trainer) -> bool:
    flats = [(first.parameters, second.parameters)]
    flats += [(state, second.optimizer.state[name]) for name, state in first.optimizer.state.items()]
    return all(np.array_equal(a[name], b[name]) for a, b in flats for name in a)


LATTICE = LatticeTerms(matches=2, distance=True, learned_points=True, symmetry_fraction=0.5)


@pytest.mark.parametrize(
    ("optimizer", "stop", "attention"),
    [("sgd", 5, "standard"), ("sgd", 6, "crystalline"), ("adamw", 5, "crystalline"), ("adamw", 6, "standard")],
)
def test_stopped_and_resumed_equals_uninterrupted(
    make_trainer: MakeTrainer, config: Config, tmp_path: Path, optimizer: str, stop: int, attention: Any
) -> None:
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention=attention, lattice=LATTICE),
        optimizer=dataclasses.replace(config.optimizer, name=optimizer),
        training=dataclasses.replace(config.training, sample_every=3, sample_tokens=5),
    )
    whole = make_trainer(config, tmp_path / "whole")
    whole.train()

    first = make_trainer(config, tmp_path / "parts", reporter=StopAt(stop))
    outcome = first.train()
    assert outcome.interrupted
    assert outcome.step == stop
    second = make_trainer(config, tmp_path / "parts")
    second.parameters.flat[...] = 7.0  # what a fresh process has there does not matter
    second.restore(load_checkpoint(tmp_path / "parts"))
    assert second.state.step == stop
    second.train()

    assert same_state(whole, second)
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    assert whole.state.best_loss == second.state.best_loss
    assert whole.guard.as_dict() == second.guard.as_dict()
    assert whole.state.snapshot().state == second.state.snapshot().state


class StopAt:
    """A reporter that presses Ctrl-C during a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == self._step:
            signal.raise_signal(signal.SIGINT)

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...


def test_an_interrupt_saves_the_step_it_came_in(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    trainer = make_trainer(config, tmp_path, reporter=StopAt(3))
    outcome = trainer.train()
    assert outcome.interrupted
    assert outcome.checkpoint is not None
    assert load_checkpoint(outcome.checkpoint).step == 3
    # Python's own handling of Ctrl-C is back
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_second_interrupt_leaves_at_once(
    make_trainer: MakeTrainer, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cllm_gpu.training.signals.ONE_PRESS", 0.0)

    class Impatient(StopAt):
        def step(self, record: dict[str, Any]) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(config, reporter=Impatient(0)).train()


def test_training_in_a_thread_leaves_signals_alone(make_trainer: MakeTrainer, config: Config) -> None:
    trainer = make_trainer(config)
    before = signal.getsignal(signal.SIGINT)
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(trainer.train()))
    thread.start()
    thread.join()
    assert outcomes[0].step == config.training.steps
    assert signal.getsignal(signal.SIGINT) is before


def test_a_resumed_run_may_be_longer(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    make_trainer(config, tmp_path).train()
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=15))
    trainer = make_trainer(longer, tmp_path)
    trainer.restore(load_checkpoint(tmp_path))
    assert trainer.train().step == 15
    assert [r["step"] for r in records(tmp_path) if r["kind"] == "step"] == list(range(1, 16))


def test_another_batch_size_goes_on_at_the_sample_where_the_run_stopped(
    make_trainer: MakeTrainer, config: Config, tmp_path: Path
) -> None:
    """12 steps of 6 samples, then 3 of 2, then 2 of 4: no sample is left out, none comes twice."""

    def samples(trainer: Trainer) -> list[int]:
        return [int(n) for step in range(trainer.state.step, trainer.config.training.steps)
                for n in trainer.batches.samples(step)]  # fmt: skip

    seen: list[int] = []
    for steps, batch in ((12, 6), (15, 2), (17, 4)):
        loop = dataclasses.replace(config.training, steps=steps, batch=batch, micro_batch=2)
        trainer = make_trainer(dataclasses.replace(config, training=loop), tmp_path)
        if seen:
            trainer.restore(load_checkpoint(tmp_path))
        seen += samples(trainer)
        trainer.train()
        assert trainer.state.tokens_seen == len(seen) * 24
    assert seen == list(range(12 * 6 + 3 * 2 + 2 * 4))


def test_another_model_or_optimizer_is_refused(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    make_trainer(config, tmp_path).train()
    checkpoint = load_checkpoint(tmp_path)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, width=64))
    with pytest.raises(UserError, match="of another model: width is 32 in it, 64 here"):
        make_trainer(wider).restore(checkpoint)
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="sgd"))
    with pytest.raises(UserError, match="optimizer"):
        make_trainer(other).restore(checkpoint)


def test_other_heads_of_the_same_shapes_are_refused(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    make_trainer(config, tmp_path).train()
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, heads=4))
    with pytest.raises(UserError, match="heads is 2 in it, 4 here"):
        make_trainer(other).restore(load_checkpoint(tmp_path))


def test_changed_data_is_refused(make_trainer: MakeTrainer, config: Config, dataset: Dataset, tmp_path: Path) -> None:
    make_trainer(config, tmp_path).train()
    changed = dataclasses.replace(dataset, validation=dataset.train)
    with pytest.raises(UserError, match="not what the checkpoint was trained on"):
        make_trainer(config, dataset=changed).restore(load_checkpoint(tmp_path))


def test_an_interrupt_during_an_evaluation_saves_and_the_evaluation_is_made_up_for(
    make_trainer: MakeTrainer, config: Config, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, sample_every=4, sample_tokens=5, sample_prompt="def ")
    )
    whole = make_trainer(config, tmp_path / "whole")
    whole.train()
    first = make_trainer(config, tmp_path / "parts")
    losses = first.workers.losses

    def pressed(*arguments: Any) -> Any:
        if first.state.step == 8:
            signal.raise_signal(signal.SIGINT)
        return losses(*arguments)

    first.workers.losses = pressed  # type: ignore[method-assign]
    outcome = first.train()
    assert (outcome.interrupted, outcome.step) == (True, 8)
    second = make_trainer(config, tmp_path / "parts")
    second.restore(load_checkpoint(tmp_path / "parts"))
    second.train()
    assert same_state(whole, second)
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_samples_are_kept_and_change_nothing_else(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    plain = make_trainer(config, tmp_path / "plain")
    plain.train()
    loop = dataclasses.replace(config.training, sample_every=3, sample_tokens=5, sample_prompt="def ")
    sampled = make_trainer(dataclasses.replace(config, training=loop), tmp_path / "sampled")
    sampled.train()
    assert same_state(plain, sampled)
    found = records(tmp_path / "sampled")
    samples = [r for r in found if r["kind"] == "sample"]
    assert [r for r in found if r["kind"] != "sample"] == records(tmp_path / "plain")
    assert [(r["step"], r["prompt"]) for r in samples] == [(step, "def ") for step in (3, 6, 9)]  # 12: the caller's
    assert all(isinstance(r["text"], str) and len(r["text"]) <= 5 for r in samples)
    assert any(r["text"] for r in samples)


def test_old_checkpoints_go_and_the_best_stays(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    loop = dataclasses.replace(config.training, checkpoint_every=1, keep_last=2)
    trainer = make_trainer(dataclasses.replace(config, training=loop), tmp_path)
    trainer.train()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept[-2:] == ["step_00000011", "step_00000012"]
    assert 2 <= len(kept) <= 3
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step_00000012"


def test_a_full_disk_ends_the_run_in_one_line(
    make_trainer: MakeTrainer, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(config, tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        trainer.train()
