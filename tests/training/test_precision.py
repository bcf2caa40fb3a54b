"""Training in bfloat16, with and without master weights: it follows float32, resumes to the bit, and can be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.checkpoint.checkpoint import load_checkpoint, load_model
from cllm_gpu.checkpoint.pretrained import load_pretrained
from cllm_gpu.config import Config
from cllm_gpu.data import Dataset
from cllm_gpu.devices.logit_chunks import LogitChunks
from cllm_gpu.model.architecture import LatticeTerms
from cllm_gpu.ops.precision import BFLOAT16
from cllm_gpu.training.memory_plan import plan_memory
from cllm_gpu.training.metrics import read_metrics
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.compiler import find_compiler
from cllm_gpu.utils.errors import UserError
from tests.training.conftest import host_step

MakeTrainer = Callable[..., Trainer]
POINTS = LatticeTerms(matches=2, distance=True, learned_points=True, symmetry_fraction=0.5, start=0.5)
WITH_TERMS = ("numpy", "simulator")
"""Backends whose attention takes the lattice's score terms in bfloat16."""
STEPS = 10
FOLLOWS = 2.0**-9
"""Relative difference of losses: an average rounding to 8 bits, as for one step in tests/ops/cuda/test_training.py."""


def backend_of(name: str, precision: Any = "bf16", workers: int = 1) -> Backend:
    if name == "simulator" and find_compiler() is None:
        pytest.skip("not run: the simulator needs a C++ compiler")
    return get_backend(name, workers=workers, precision=precision)


def short(config: Config, precision: Any = "bf16", *, masters: bool = True, **loop: Any) -> Config:
    """A small batch of 10 steps, an evaluation and a checkpoint only where asked for."""
    chosen = {"steps": STEPS, "batch": 4, "micro_batch": 2, "evaluate_every": 0, "checkpoint_every": 0} | loop
    return dataclasses.replace(
        config,
        precision=precision,
        optimizer=dataclasses.replace(config.optimizer, master_weights=masters),
        training=dataclasses.replace(config.training, evaluation_batches=1, sample_tokens=0, **chosen),
    )


def crystalline(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="crystalline", lattice=POINTS))


class Losses:
    """A reporter that keeps the losses."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def step(self, record: dict[str, Any]) -> None:
        self.found.append(record["loss"])

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...


def losses(make_trainer: MakeTrainer, config: Config, backend: Backend) -> np.ndarray[Any, Any]:
    kept = Losses()
    make_trainer(config, reporter=kept, backend=backend).train()
    return np.array(kept.found)


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("name", ["numpy", "simulator"])
def test_training_follows_float32(
    make_trainer: MakeTrainer, config: Config, within: Any, name: str, masters: bool
) -> None:
    """Ten steps with dropout, decay and two micro-batches beside the float32 reference from the same weights."""
    want = losses(make_trainer, short(config, "fp32"), backend_of("numpy", "fp32"))
    got = losses(make_trainer, short(config, masters=masters), backend_of(name))
    assert want[-1] < want[0] - 0.3, "the run learns nothing, so it proves nothing"
    within(f"losses on {name}", float(np.max(np.abs(got - want) / want)), FOLLOWS)
    assert np.any(got != want)


@pytest.mark.parametrize("name", WITH_TERMS)
def test_a_crystalline_model_follows_float32(make_trainer: MakeTrainer, config: Config, within: Any, name: str) -> None:
    config = crystalline(config)
    want = losses(make_trainer, short(config, "fp32"), backend_of("numpy", "fp32"))
    got = losses(make_trainer, short(config), backend_of(name))
    within("losses", float(np.max(np.abs(got - want) / want)), FOLLOWS)


@pytest.mark.parametrize("name", WITH_TERMS)
def test_learned_points_are_float32_inside_and_have_gradients(
    make_trainer: MakeTrainer, config: Config, within: Any, name: str
) -> None:
    """Of one batch and the same (bf16) weights, points and scalars: 2% as in tests/ops/cuda/test_training.py."""
    gradients = {}
    for precision in ("bf16", "fp32"):
        trainer = make_trainer(short(crystalline(config), precision), backend=backend_of(name, precision))
        trainer.parameters.flat[...] = trainer.parameters.flat.astype(BFLOAT16)
        host_step(trainer).loss_and_gradients(0)
        gradients[precision] = {key: view.astype(np.float64) for key, view in trainer.gradients.items()}
        assert trainer.workers._activations[0]["lattice"].points.dtype == np.float32
    for parameter in ("lattice_points", "blocks.0.lattice_scalars", "blocks.1.lattice_scalars"):
        got, want = gradients["bf16"][parameter], gradients["fp32"][parameter]
        assert np.linalg.norm(want) > 0
        within(parameter, float(np.linalg.norm(got - want) / np.linalg.norm(want)), 0.02)


@pytest.mark.parametrize(
    ("name", "masters", "workers"),
    [
        ("simulator", True, 1),
        ("simulator", False, 1),
        ("numpy", False, 2),
        pytest.param("cupy", True, 1, marks=pytest.mark.gpu),
        pytest.param("cupy", False, 1, marks=pytest.mark.gpu),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(
    make_trainer: MakeTrainer, config: Config, tmp_path: Path, name: str, masters: bool, workers: int
) -> None:
    backend = backend_of(name, workers=workers)
    settings = short(config, masters=masters, steps=6)
    whole = make_trainer(settings, tmp_path / "whole", backend=backend)
    whole.train()
    first = make_trainer(dataclasses.replace(settings), tmp_path / "parts", backend=backend)
    while first.state.step < 3:
        first._one_step()
    first._checkpoint(best=False)
    second = make_trainer(settings, tmp_path / "parts", backend=backend)
    for views in (second.parameters, second.optimizer.weights(second.parameters)):
        for view in views.values():
            view[...] = 7.0  # what a fresh process has there does not matter
    second.restore(load_checkpoint(tmp_path / "parts"))
    second.train()
    assert np.array_equal(whole.parameters.flat, second.parameters.flat)
    one, other = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    assert one.step == other.step == 6
    for key, array in one.parameters.items():
        np.testing.assert_array_equal(other.parameters[key], array, strict=True)
    for moment, arrays in one.optimizer.items():
        for key, array in arrays.items():
            np.testing.assert_array_equal(other.optimizer[moment][key], array, strict=True)
    followed, alone = (
        [r["loss"] for r in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("parts", "whole")
    )
    assert followed == alone


def test_a_checkpoint_holds_the_masters_and_every_backend_reads_it(
    make_trainer: MakeTrainer, config: Config, tmp_path: Path
) -> None:
    trainer = make_trainer(short(config, steps=3), tmp_path, backend=backend_of("numpy"))
    trainer.train()
    stored = load_model(tmp_path, "last").parameters
    masters = trainer.optimizer.masters
    assert masters is not None
    for name, view in masters.items():
        np.testing.assert_array_equal(stored[name], view, strict=True)
        np.testing.assert_array_equal(trainer.parameters[name], view.astype(BFLOAT16), strict=True)
    assert any(np.any(view != trainer.parameters[name]) for name, view in masters.items())
    found = load_pretrained(tmp_path, backend_of("numpy", "fp32"), "last")
    assert found.model.parameters.layout.dtype == np.float32
    assert all(np.array_equal(view, stored[name]) for name, view in found.model.parameters.items())


def test_weights_without_masters_are_read_in_float32(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    trainer = make_trainer(short(config, masters=False, steps=3), tmp_path, backend=backend_of("numpy"))
    trainer.train()
    stored = load_model(tmp_path, "last").parameters
    assert {array.dtype for array in stored.values()} == {BFLOAT16}
    found = load_pretrained(tmp_path, backend_of("numpy", "fp32"), "last")
    assert found.model.parameters.layout.dtype == np.float32
    assert all(np.array_equal(view, trainer.parameters[name]) for name, view in found.model.parameters.items())


def test_a_run_may_change_its_precision_where_nothing_is_lost(
    make_trainer: MakeTrainer, config: Config, tmp_path: Path
) -> None:
    """Masters are float32 weights, so float32 goes on in bf16 and back; to no masters it would be rounded."""
    make_trainer(short(config, "fp32", steps=2), tmp_path, backend=backend_of("numpy", "fp32")).train()
    checkpoint = load_checkpoint(tmp_path)
    onward = make_trainer(short(config, steps=4), backend=backend_of("numpy"))
    onward.restore(checkpoint)
    for name, view in onward.parameters.items():
        np.testing.assert_array_equal(view, checkpoint.parameters[name].astype(BFLOAT16), strict=True)
    alone = make_trainer(short(config, masters=False), backend=backend_of("numpy"))
    with pytest.raises(UserError, match=r"^the checkpoint's weights are float32, and without master weights"):
        alone.restore(checkpoint)


@pytest.mark.parametrize("masters", [True, False])
def test_training_begins_from_a_float32_model(
    make_trainer: MakeTrainer, config: Config, tmp_path: Path, masters: bool
) -> None:
    make_trainer(short(config, "fp32", steps=2), tmp_path, backend=backend_of("numpy", "fp32")).train()
    weights = load_model(tmp_path, "best").parameters
    shape = dataclasses.replace(config.model, size="custom")
    began = dataclasses.replace(short(config, masters=masters), model=shape, initial=tmp_path)
    trainer = make_trainer(began, backend=backend_of("numpy"))
    for name, view in trainer.parameters.items():
        np.testing.assert_array_equal(view, weights[name].astype(BFLOAT16), strict=True)
    assert (trainer.optimizer.masters is not None) is masters
    if trainer.optimizer.masters is not None:
        assert all(np.array_equal(view, weights[name]) for name, view in trainer.optimizer.masters.items())


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize(("chunk", "micro", "workers"), [(None, None, 1), (7, None, 1), (7, 2, 1), (7, None, 2)])
def test_the_plan_is_what_is_allocated(
    make_trainer: MakeTrainer,
    config: Config,
    dataset: Dataset,
    masters: bool,
    chunk: int | None,
    micro: int | None,
    workers: int,
) -> None:
    """Gradients that are added up are float32, and then nothing else sums the head's."""
    for model in (config, crystalline(config)):
        settings = short(model, masters=masters, micro_batch=micro)
        backend = dataclasses.replace(backend_of("numpy", workers=workers), logit_chunks=LogitChunks(1 << 30, chunk))
        trainer = make_trainer(settings, backend=backend)
        plan = plan_memory(settings, settings.model.architecture(dataset.vocabulary), backend)
        assert plan.parameters == trainer.parameters.flat.nbytes
        assert plan.gradients == workers * trainer.gradients.flat.nbytes
        summed = micro is not None or workers > 1
        assert trainer.gradients.flat.dtype == (np.float32 if summed else BFLOAT16)
        assert (trainer.workers.activations[0]["head"].dhead is None) is (summed or chunk is None)
        arrays = [flat.flat for flat in trainer.optimizer.state.values()]
        arrays += [trainer.optimizer.masters.flat] if trainer.optimizer.masters is not None else []
        assert (
            plan.optimizer == sum(array.nbytes for array in arrays) == (6 if masters else 4) * trainer.layout.size * 2
        )
        assert plan.activations == sum(activations.bytes for activations in trainer.workers._activations)


def test_a_backend_of_another_precision_is_refused(make_trainer: MakeTrainer, config: Config) -> None:
    with pytest.raises(UserError, match=r"^precision is bf16, but the backend was made for fp32"):
        make_trainer(short(config), backend=backend_of("numpy", "fp32"))
    with pytest.raises(UserError, match=r"^optimizer\.master_weights is false, but precision is fp32"):
        short(config, "fp32", masters=False)
