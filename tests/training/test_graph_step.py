"""Steps that run on the device, ahead of the host: the same bits launched one by one, replayed, or waited for."""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.checkpoint.checkpoint import load_checkpoint
from cllm_gpu.config import Config
from cllm_gpu.data import IGNORE_INDEX
from cllm_gpu.devices.logit_chunks import LogitChunks
from cllm_gpu.model.architecture import LatticeTerms
from cllm_gpu.model.recompute import LEVELS
from cllm_gpu.ops.precision import BFLOAT16, Precision
from cllm_gpu.simulator.stream import SimulatedStream
from cllm_gpu.training.graph_step import GraphStep
from cllm_gpu.training.host_step import HostStep
from cllm_gpu.training.input_staging import InputStaging
from cllm_gpu.training.metrics import read_metrics
from cllm_gpu.training.step_timer import FIGURES
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.compiler import find_compiler
from cllm_gpu.utils.errors import UserError

MakeTrainer = Callable[..., Trainer]
SYMMETRY = LatticeTerms(distance=False, prime_distance=False, same_token=False, matches=0, symmetry_fraction=0.5)
POINTS = LatticeTerms(matches=2, prime_distance=True, learned_points=True, start=0.5)
STEPS = 6


def _sections(config: Config, **sections: dict[str, Any]) -> Config:
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


def _short(config: Config, *, watched: bool = False, **loop: Any) -> Config:
    """Dropout, a schedule, clipping and micro-batches; `watched`: spikes are, so that each step is waited for."""
    chosen = {"steps": STEPS, "batch": 4, "micro_batch": 2, "evaluate_every": 4, "evaluation_batches": 1}
    chosen |= {"checkpoint_every": 0, "sample_tokens": 0, "spike_window": STEPS if watched else 0}
    return _sections(config, training=chosen | loop)


def _kept(trainer: Trainer) -> list[np.ndarray[Any, Any]]:
    flats = [trainer.optimizer.weights(trainer.parameters), trainer.parameters, *trainer.optimizer.state.values()]
    return [np.array(trainer.backend.to_host(flat.flat)) for flat in flats]


def _same(first: Trainer, second: Trainer) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(_kept(first), _kept(second), strict=True))


class Records:
    """A reporter that keeps what does not come from a clock."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.messages: list[str] = []

    def step(self, record: dict[str, Any]) -> None:
        self.steps.append({name: value for name, value in record.items() if name not in FIGURES})

    def evaluation(self, record: dict[str, Any]) -> None:
        self.steps.append(record)

    def message(self, text: str) -> None:
        self.messages.append(text)


def _run(make: MakeTrainer, config: Config, backend: Backend, **arguments: Any) -> tuple[Trainer, Records]:
    records = Records()
    trainer = make(config, backend=backend, reporter=records, **arguments)
    trainer.train()
    return trainer, records


def _captured(trainer: Trainer) -> bool:
    assert isinstance(trainer.step, GraphStep)
    assert trainer.step.capture_refused is None
    return trainer.step.captured


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw fp32": {"precision": "fp32"},
    "adam without masters": {"optimizer": {"name": "adam", "master_weights": False}},
    "sgd": {"optimizer": {"name": "sgd", "momentum": 0.0, "clip_norm": 0.0}},
    "rope and symmetry": {"model": {"positions": "rope", "attention": "crystalline", "lattice": SYMMETRY}},
    "symmetry": {"model": {"attention": "crystalline", "lattice": SYMMETRY}},
    "score terms": {"model": {"attention": "crystalline", "lattice": LatticeTerms(distance=True, start=0.5)}},
    "learned points": {"model": {"attention": "crystalline", "lattice": POINTS}},
    "no dropout": {"model": {"dropout": 0.0}, "training": {"micro_batch": None}},
    "chunks of logits": {"chunk": 10, "training": {"micro_batch": None}},
    "chunks of logits, micro-batches": {"chunk": 10},
}


@pytest.mark.parametrize("case", CASES)
def test_a_replayed_step_is_the_step(make_trainer: MakeTrainer, config: Config, case: str) -> None:
    """The same bits from a replay, from launches one by one, and from the host's path with every number read at once.

    A number that changes from step to step and was frozen in the capture would show: rate, step, masks, rounding.
    """
    sections = dict(CASES[case])
    precision = sections.pop("precision", "bf16")
    backend = _simulator(precision)
    backend = dataclasses.replace(backend, logit_chunks=LogitChunks(1 << 30, sections.pop("chunk", None)))
    config = dataclasses.replace(config, precision=precision)
    runs = [
        _run(make_trainer, _sections(_short(config, capture=capture, watched=watched), **sections), backend)
        for capture, watched in ((True, False), (False, False), (True, True))
    ]
    replayed, launched, waited = runs
    assert _captured(replayed[0])
    assert not _captured(launched[0])
    assert isinstance(waited[0].step, HostStep)
    assert replayed[1].steps == launched[1].steps
    assert _same(replayed[0], launched[0])
    assert _same(replayed[0], waited[0])
    narrow = replayed[0].gradients.flat.dtype == BFLOAT16
    assert narrow is (CASES[case].get("training") is not None)  # micro-batches add to float32
    assert (replayed[0].workers.activations[0]["head"].dhead is not None) is (narrow and "chunk" in CASES[case])
    for ours, theirs in zip(replayed[1].steps, waited[1].steps, strict=True):
        for name, value in ours.items():
            same = value == theirs[name]
            # a sum in float64 whose order the host chooses
            assert same or abs(value - theirs[name]) <= 1e-13 * abs(value), name
    assert len({step["update_norm"] for step in replayed[1].steps if step["kind"] == "step"}) == STEPS


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [{"attention": "crystalline", "lattice": POINTS}, {"positions": "rope"}])
def test_a_captured_step_may_compute_again(
    make_trainer: MakeTrainer, config: Config, model: dict[str, Any], precision: Precision
) -> None:
    """Every recompute level, replayed: the bits of the level that computes nothing again."""
    config = dataclasses.replace(config, precision=precision)
    first, *others = (
        _run(make_trainer, _sections(_short(config, steps=3, recompute=level), model=model), _simulator(precision))
        for level in LEVELS
    )
    for other in others:
        assert _captured(other[0])
        assert other[1].steps == first[1].steps
        assert _same(other[0], first[0])


def _late(backend: Backend) -> Backend:
    """The backend with steps as late as they may be, and copies to the device as early."""
    assert backend.device is not None
    return dataclasses.replace(backend, device=dataclasses.replace(backend.device, stream=SimulatedStream(late=True)))


def _forgetting(which: str) -> Callable[..., None]:
    """An `InputStaging.upload` that forgets one of its two waits."""

    def upload(inputs: Any, host: Any) -> None:
        if which != "free" and inputs._staging_free is not None:
            inputs._copies.wait_event(inputs._staging_free)
        inputs._copies.upload(host, inputs._staging)
        if which != "uploaded":
            inputs._stream.wait_event(inputs._copies.record_event())
        inputs._stream.copy(inputs._staging, inputs._inputs)
        inputs._staging_free = inputs._stream.record_event()

    return upload


@pytest.mark.parametrize("forgets", ["uploaded", "free", "nothing"])
def test_a_wait_between_the_steps_and_their_copies_is_missed(
    make_trainer: MakeTrainer, config: Config, monkeypatch: pytest.MonkeyPatch, forgets: str
) -> None:
    """With both waits the bits do not depend on when the card does what; without one of them they do."""
    config = dataclasses.replace(_short(config, evaluate_every=0), precision="bf16")
    backend = _simulator()
    want, records = _run(make_trainer, config, backend)
    monkeypatch.setattr(InputStaging, "upload", _forgetting(forgets))
    same = []
    for changed in (backend, _late(backend)):
        trainer, found = _run(make_trainer, config, changed)
        assert _captured(trainer)
        same.append(_same(trainer, want) and found.steps == records.steps)
    assert same == [forgets != "uploaded", forgets != "free"]


def _at(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, actions: dict[int, Callable[[Trainer], None]]) -> None:
    """Do something before a step's batch is asked for."""
    batch = trainer.batches.batch

    def prepared(step: int) -> Any:
        if step in actions:
            trainer.backend.synchronize()
            actions[step](trainer)
        return batch(step)

    monkeypatch.setattr(trainer.batches, "batch", prepared)


def _set_norm(trainer: Trainer, value: float) -> None:
    trainer.parameters["final_norm.weight"][3] = value


def _poison(trainer: Trainer) -> None:
    _set_norm(trainer, math.nan)


def _heal(trainer: Trainer) -> None:
    _set_norm(trainer, 1.0)


def test_a_skipped_step_changes_nothing_and_is_not_counted(
    make_trainer: MakeTrainer, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 4 of a replay have weights that are not a number: as launched one by one, and as waited for."""
    backend = _simulator()
    runs = []
    for capture, watched in ((True, False), (False, False), (True, True)):
        records = Records()
        quiet = _short(config, capture=capture, watched=watched, evaluate_every=0)
        trainer = make_trainer(dataclasses.replace(quiet, precision="bf16"), backend=backend, reporter=records)
        _at(monkeypatch, trainer, {3: _poison, 5: _heal})
        trainer.train()
        runs.append((trainer, records))
    (first, records), *others = runs
    assert _captured(first)
    assert [step["skipped"] is not None for step in records.steps[:-1]] == [i in (3, 4) for i in range(STEPS)]
    assert [step["update_norm"] == 0.0 for step in records.steps[:-1]] == [i in (3, 4) for i in range(STEPS)]
    assert (first.optimizer.updates, first.guard.skipped, first.guard.skipped_in_a_row) == (STEPS - 2, 2, 0)
    assert sum("skipped" in line for line in records.messages) == 2
    for other, theirs in others:
        assert [step["skipped"] for step in theirs.steps[:-1]] == [step["skipped"] for step in records.steps[:-1]]
        assert _same(first, other)


def test_a_gradient_too_large_to_be_squared_is_refused_for_the_same_reason(
    make_trainer: MakeTrainer, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite loss and norm, and no clipping: only the device knows before the update, and the host says why."""
    found = []
    for watched in (False, True):
        quiet = _sections(_short(config, watched=watched, evaluate_every=0), optimizer={"clip_norm": 0.0})
        records = Records()
        trainer = make_trainer(dataclasses.replace(quiet, precision="bf16"), backend=_simulator(), reporter=records)
        grown = {3: lambda t: _set_norm(t, 1e22), 4: lambda t: _set_norm(t, 1.0)}
        _at(monkeypatch, trainer, grown)
        trainer.train()
        found.append([(step["skipped"], step["gradient_norm"]) for step in records.steps[:-1]])
    reason, norm = found[0][3]
    assert reason == "gradient too large to be squared"
    assert 1e19 < norm < math.inf
    assert [step for step, _ in found[0]].count(None) == STEPS - 1
    assert found[0] == found[1]


def test_it_stops_after_too_many_skips_with_nothing_applied_behind_them(
    make_trainer: MakeTrainer, config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The step after the last one allowed is under way when the host learns of it, and its batch is a good one."""
    config = dataclasses.replace(_short(config, maximum_skipped=2, steps=9, evaluate_every=0), precision="bf16")
    trainer = make_trainer(config, tmp_path, backend=_simulator())
    kept: list[Any] = []
    actions = {3: _poison, 5: lambda t: (_heal(t), kept.extend(_kept(t)))}
    _at(monkeypatch, trainer, actions)
    with pytest.raises(UserError, match="2 steps in a row"):
        trainer.train()
    assert (trainer.state.step, trainer.optimizer.updates) == (5, 3)
    assert all(np.array_equal(a, b) for a, b in zip(kept, _kept(trainer), strict=True))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(("stop", "done"), [(2, 3), (3, 4), (4, 4)])
def test_stopped_and_resumed_equals_uninterrupted(
    make_trainer: MakeTrainer, config: Config, tmp_path: Path, stop: int, done: int
) -> None:
    """An interrupt finds a step under way, which is finished, counted and saved; none is before the evaluation at 4."""
    backend = _simulator()
    config = dataclasses.replace(_short(config), precision="bf16")

    class Stop(Records):
        def step(self, record: dict[str, Any]) -> None:
            super().step(record)
            if record["step"] == stop:
                signal.raise_signal(signal.SIGINT)

    whole, _ = _run(make_trainer, config, backend, folder=tmp_path / "whole")
    first = make_trainer(config, tmp_path / "parts", backend=backend, reporter=Stop())
    outcome = first.train()
    assert outcome.interrupted
    assert outcome.step == first.state.step == done
    second = make_trainer(config, tmp_path / "parts", backend=backend)
    second.restore(load_checkpoint(tmp_path / "parts"))
    second.train()
    assert _same(whole, second)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    without = [[{k: v for k, v in line.items() if k not in FIGURES} for line in one] for one in lines]
    assert without[0] == without[1]


def test_batches_of_other_weight_are_launched_by_themselves(
    make_trainer: MakeTrainer, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets that are ignored change the loss's factor, which the captured step holds as a number."""
    backend, runs = _simulator(), []
    for capture in (True, False):
        trainer = make_trainer(dataclasses.replace(_short(config, capture=capture), precision="bf16"), backend=backend)
        batch = trainer.batches.batch

        def some_ignored(step: int, batch: Any = batch) -> Any:
            tokens, targets = batch(step)
            if step in (2, 5):
                targets = targets.copy()
                targets[:, :: step + 1] = IGNORE_INDEX
            return tokens, targets

        monkeypatch.setattr(trainer.batches, "batch", some_ignored)
        trainer.train()
        runs.append(trainer)
    assert _captured(runs[0])
    assert _same(*runs)


def test_a_step_that_allocates_is_not_captured_and_says_why(make_trainer: MakeTrainer, config: Config) -> None:
    """It runs all the same."""
    backend = _simulator()
    norm = backend.ops.layernorm_forward

    def allocating(x: Any, weight: Any, *arguments: Any, **named: Any) -> None:
        norm(x, weight.copy(), *arguments, **named)

    changed = dataclasses.replace(backend, ops=backend.ops.replace(layernorm_forward=allocating))
    config = dataclasses.replace(_short(config), precision="bf16")
    trainer, records = _run(make_trainer, config, changed)
    want, _ = _run(make_trainer, config, backend)
    refused = [line for line in records.messages if "not captured" in line]
    assert refused == [
        "steps are not captured: a captured step must not do this: it allocates an array of shape (32,) bfloat16"
    ]
    assert _same(trainer, want)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "steps run ahead of their results, recorded and replayed by the simulator"),
        ({"capture": False}, "steps run ahead of their results, each kernel launched by itself, as asked"),
        ({"watched": True}, "steps wait for their loss, one by one, to watch for spikes"),
        ({"diagnose_every": 2}, "steps wait for their loss, one by one, for looks at their gradients"),
    ],
)
def test_how_steps_run_is_said(make_trainer: MakeTrainer, config: Config, changes: Any, line: str) -> None:
    config = dataclasses.replace(_short(config, steps=1, **changes), precision="bf16")
    _, records = _run(make_trainer, config, _simulator())
    assert records.messages[0].startswith(line)


def _simulator(precision: Any = "bf16") -> Backend:
    if find_compiler() is None:
        pytest.skip("not run: the simulator needs a C++ compiler")
    return get_backend("simulator", precision=precision)
