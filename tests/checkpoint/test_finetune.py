"""Training that begins from a model: its weights to the bit, and everything else as in a run of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.checkpoint.checkpoint import load_checkpoint, load_model, newest_checkpoint
from cllm_gpu.checkpoint.finetune import find_origin, initial_configuration, require_same_shape
from cllm_gpu.config import Config, ModelConfig, TrainingConfig
from cllm_gpu.data import Dataset
from cllm_gpu.model.architecture import LatticeTerms
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.errors import UserError

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def begun(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> Path:
    """A run of a few steps, with dropout and another seed than what begins from it."""
    first = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=4, seed=9))
    make_trainer(first, tmp_path / "first").train()
    return tmp_path / "first"


def further(config: Config, begun: Path, **training: Any) -> Config:
    """A configuration that begins from `begun`, otherwise as `config`."""
    base = initial_configuration(begun)
    loop = dataclasses.replace(config.training, **training)
    return dataclasses.replace(base, optimizer=config.optimizer, schedule=config.schedule, training=loop)


def flats(trainer: Trainer) -> list[Any]:
    return [trainer.parameters.flat, *(state.flat for state in trainer.optimizer.state.values())]


def test_it_is_a_fresh_run_with_other_weights(make_trainer: MakeTrainer, config: Config, begun: Path) -> None:
    """The same bits as a trainer into which the weights are put by hand: optimizer, schedule, batches from step 0."""
    trainer = make_trainer(further(config, begun))
    weights = load_model(begun).parameters
    assert all(np.array_equal(trainer.parameters[name], weights[name]) for name in weights)
    assert (trainer.state.step, trainer.optimizer.updates, trainer.state.tokens_seen) == (0, 0, 0)
    assert not any(state.flat.any() for state in trainer.optimizer.state.values())

    by_hand = make_trainer(config)
    for name, view in by_hand.parameters.items():
        view[...] = weights[name]
    by_hand.train()
    trainer.train()
    assert all(np.array_equal(a, b) for a, b in zip(flats(trainer), flats(by_hand), strict=True))
    assert not np.array_equal(trainer.parameters["token_embedding"], weights["token_embedding"])


def test_stopped_and_resumed_equals_uninterrupted(
    make_trainer: MakeTrainer, config: Config, begun: Path, tmp_path: Path
) -> None:
    whole = make_trainer(further(config, begun))
    whole.train()
    make_trainer(further(config, begun, checkpoint_every=5, evaluate_every=0), tmp_path / "parts").train()
    resumed = make_trainer(further(config, begun, evaluate_every=0), tmp_path / "parts")
    for view in resumed.parameters.values():
        view[...] = 7.0
    resumed.restore(load_checkpoint(tmp_path / "parts" / "checkpoints" / "step_00000010"))
    assert resumed.state.initial == whole.state.initial
    resumed.train()
    assert all(np.array_equal(a, b) for a, b in zip(flats(whole), flats(resumed), strict=True))


def test_the_run_records_where_it_began(make_trainer: MakeTrainer, config: Config, begun: Path, tmp_path: Path) -> None:
    make_trainer(further(config, begun), tmp_path / "second").train()
    folder = newest_checkpoint(begun)
    assert folder is not None
    origin = load_checkpoint(tmp_path / "second").state["initial"]
    assert (origin["path"], origin["step"]) == (str(begun), 4)
    assert origin["sha256"] == find_origin(begun).sha256
    assert load_checkpoint(begun).state["initial"] is None
    assert load_checkpoint(tmp_path / "second").config["initial"] == str(begun)


def test_a_crystalline_model_goes_on_as_one(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    terms = LatticeTerms(matches=2, distance=True, learned_points=True, symmetry_fraction=0.5)
    model = dataclasses.replace(config.model, attention="crystalline", lattice=terms)
    make_trainer(dataclasses.replace(config, model=model), tmp_path / "first").train()
    base = initial_configuration(tmp_path / "first")
    assert base.model.architecture(257) == find_origin(tmp_path / "first").architecture
    trainer = make_trainer(further(config, tmp_path / "first"))
    weights = load_model(tmp_path / "first").parameters
    assert all(np.array_equal(trainer.parameters[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layers": 3}, "model.layers is 3, but training begins from the model in .*first, where it is 2"),
        ({"size": "tiny"}, "model.size tiny has width 64, .* where it is 32"),
        ({"positions": "rope"}, "model.positions is rope, .* where it is learned"),
        ({"bias": False}, "model.bias is False, .* where it is True"),
        ({"vocabulary": 300}, "model.vocabulary is 300, .* where it is 257"),
        ({"vocabulary": None, "context": 12}, "model.context is 12, .* where it is 24"),
        ({"attention": "standard"}, "model.lattice is None, .* where it is .*matches"),
    ],
)
def test_settings_that_contradict_the_model(begun: Path, changes: dict[str, Any], expected: str) -> None:
    model = dataclasses.replace(initial_configuration(begun).model, **changes)
    with pytest.raises(UserError, match=expected):
        require_same_shape(model, find_origin(begun))


def test_dropout_may_be_chosen_anew(make_trainer: MakeTrainer, config: Config, begun: Path) -> None:
    base = further(config, begun)
    assert base.model.dropout == 0.1
    changed = dataclasses.replace(base, model=dataclasses.replace(base.model, dropout=0.0))
    assert make_trainer(changed).architecture.dropout == 0.0


def test_text_of_another_tokenizer_is_refused(config: Config, begun: Path, dataset: Dataset, backend: Any) -> None:
    foreign = dataclasses.replace(dataset, tokenizer=None)
    trainer = Trainer(further(config, begun), backend, foreign)
    with pytest.raises(UserError, match=r"has another tokenizer: bytes \(.*\), that of the data is none"):
        trainer.initialise()
    trainer.close()


def test_a_model_may_have_room_for_more_tokens_than_the_data() -> None:
    model = ModelConfig(size="tiny", vocabulary=300)
    assert model.architecture(257).vocabulary == 300
    with pytest.raises(UserError, match=r"model.vocabulary is 256; the data has 257 token ids"):
        dataclasses.replace(model, vocabulary=256).architecture(257)
    with pytest.raises(UserError, match=r"model.size is custom, which does not say model.layers"):
        ModelConfig(size="custom").architecture(257)


def test_nothing_to_begin_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        initial_configuration(tmp_path / "nowhere")
    assert Config(training=TrainingConfig(steps=1)).initial is None
