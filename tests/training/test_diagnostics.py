"""Looks into a step: what they say against plain NumPy, and that they change nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import get_backend
from cllm_gpu.config import Config, TrainingConfig
from cllm_gpu.training.diagnostics import DIAGNOSTICS, is_due, largest, largest_activations
from cllm_gpu.training.metrics import read_metrics
from cllm_gpu.training.step_timer import FIGURES
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.errors import UserError
from tests.training.conftest import host_step

MakeTrainer = Callable[..., Trainer]
EXACT_SUMS = 1e-12
"""Relative: sums of a few thousand squares in float64, in another order; n·eps is 2e-12 at the very worst."""
NORMALISED = 1e-5
"""Relative: float32 matrix products of width 32 and sums of as many squares in another order."""


def looking(config: Config, every: int, **training: Any) -> Config:
    """`config` with a look every so many steps."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, diagnose_every=every, **training))


def without_dropout(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))


def close(found: float, expected: float, bound: float) -> None:
    error = abs(found - expected)
    if not (error <= bound * abs(expected)):
        pytest.fail(f"{found} is not {expected}: off by {error / abs(expected):.1e}, {bound:.1e} is allowed")


def wide(x: Any) -> np.ndarray[Any, Any]:
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("every", [0, 1, 4])
def test_when_a_look_is_due(every: int) -> None:
    expected = {0: [], 1: list(range(1, 10)), 4: [1, 4, 8]}
    assert [step for step in range(1, 10) if is_due(every, step)] == expected[every]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_norms_are_those_of_the_step(make_trainer: MakeTrainer, config: Config, tmp_path: Path, precision: Any) -> None:
    """Gradient, weights and update of every parameter, micro-batches and dropout included."""
    config = dataclasses.replace(looking(config, 1, steps=3), precision=precision)
    backend = get_backend("numpy", workers=2, precision=precision)
    trainer = make_trainer(config, tmp_path, backend=backend)
    weights, before = trainer.optimizer.weights(trainer.parameters), []
    gradients, after = [], []
    apply = trainer.optimizer.apply

    def watched(parameters: Any, given: Any, **settings: Any) -> Any:
        before.append({name: wide(view) for name, view in weights.items()})
        gradients.append({name: wide(view) for name, view in given.items()})
        report = apply(parameters, given, **settings)
        after.append({name: wide(view) for name, view in weights.items()})
        return report

    trainer.optimizer.apply = watched  # type: ignore[method-assign]
    trainer.train()
    looks = read_metrics(tmp_path / DIAGNOSTICS)
    assert [look["step"] for look in looks] == [1, 2, 3]
    for number, look in enumerate(looks):
        assert look["skipped"] is None
        assert set(look["parameters"]) == set(trainer.parameters)
        for name, found in look["parameters"].items():
            gradient = gradients[number][name]
            assert found["size"] == gradient.size
            assert found["zeros"] == np.count_nonzero(gradient == 0)
            assert found["subnormals"] == np.count_nonzero((gradient != 0) & (np.abs(gradient) < 2.0**-126))
            close(found["gradient"], float(np.linalg.norm(gradient)), EXACT_SUMS)
            close(found["weight"], float(np.linalg.norm(before[number][name])), EXACT_SUMS)
            # the difference of two float32 numbers near each other is exact, or rounded once
            close(found["update"], float(np.linalg.norm(after[number][name] - before[number][name])), 1e-6)
    assert any(found["update"] > 0 for found in looks[-1]["parameters"].values())


def test_activations_are_those_of_the_forward(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    """Computed anew from tokens and weights: embedding, layer norm, q k v, attention, the MLP, logits; all rows."""
    loop = {"steps": 1, "micro_batch": None}
    config = looking(without_dropout(config), 1, **loop)
    trainer = make_trainer(config, tmp_path, backend=get_backend("numpy", workers=2))
    p = {name: wide(view) for name, view in trainer.parameters.items()}
    tokens, _ = trainer.batches.batch(0)
    trainer.train()
    found = read_metrics(tmp_path / DIAGNOSTICS)[0]["activations"]
    expected: dict[str, list[float]] = {}

    def keep(kind: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        expected.setdefault(kind, []).append(float(np.abs(x).max()))
        return x

    x = p["token_embedding"][tokens] + p["position_embedding"]
    for layer in range(trainer.architecture.layers):
        weights = {name.split(".", 2)[2]: view for name, view in p.items() if name.startswith(f"blocks.{layer}.")}
        x = _block(keep("attention_residual", x), weights, trainer.architecture.heads, keep)
    final = _norm(keep("final_residual", x), p["final_norm.weight"], p["final_norm.bias"])
    keep("logits", final @ p["token_embedding"].T)
    assert set(found) == set(expected)
    for kind, values in expected.items():
        assert len(found[kind]) == len(values)
        for one, other in zip(found[kind], values, strict=True):
            close(one, other, NORMALISED)


def _norm(x: Any, weight: Any, bias: Any) -> Any:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias


def _block(x: Any, w: dict[str, Any], heads: int, keep: Callable[[str, Any], Any]) -> Any:
    """One block on the residual stream x (B, T, C), in float64."""
    qkv = keep(
        "qkv", _norm(x, w["attention_norm.weight"], w["attention_norm.bias"]) @ w["qkv.weight"].T + w["qkv.bias"]
    )
    q, k, v = (part.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for part in np.split(qkv, 3, axis=-1))
    scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1])
    scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
    sums = np.exp(scores).sum(axis=-1)
    keep("lse", np.log(sums))
    attended = keep("attended", (np.exp(scores) / sums[..., None] @ v).swapaxes(1, 2).reshape(x.shape))
    x = keep("mlp_residual", x + attended @ w["projection.weight"].T + w["projection.bias"])
    hidden = keep(
        "hidden", _norm(x, w["mlp_norm.weight"], w["mlp_norm.bias"]) @ w["mlp_up.weight"].T + w["mlp_up.bias"]
    )
    gelu = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return x + keep("activated", gelu) @ w["mlp_down.weight"].T + w["mlp_down.bias"]


def test_a_look_changes_no_bit(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    """Weights, moments and metrics of a run that is looked into at every step, and of one that is not; times differ."""
    runs = {}
    for every in (0, 1):
        trainer = make_trainer(looking(config, every), tmp_path / str(every))
        trainer.train()
        state = [trainer.parameters.flat.copy(), *(moments.flat.copy() for moments in trainer.optimizer.state.values())]
        lines = [
            {name: value for name, value in record.items() if name not in FIGURES}
            for record in read_metrics(tmp_path / str(every) / "metrics.jsonl")
        ]
        runs[every] = state, lines
    assert all(np.array_equal(one, other) for one, other in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1] == runs[1][1]
    assert not (tmp_path / "0" / DIAGNOSTICS).exists()
    assert len(read_metrics(tmp_path / "1" / DIAGNOSTICS)) == config.training.steps


def test_a_resumed_run_has_the_same_looks(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    config = looking(config, 3)
    make_trainer(config, tmp_path / "whole").train()
    first = make_trainer(config, tmp_path / "cut")
    while first.state.step < 7:
        first._one_step()
        if first.state.step == 5:
            kept = copy.deepcopy(first.state.snapshot())  # it holds views
    again = make_trainer(config, tmp_path / "cut")
    again.restore(kept)
    assert [look["step"] for look in read_metrics(tmp_path / "cut" / DIAGNOSTICS)] == [1, 3]
    again.train()
    files = [(tmp_path / name / DIAGNOSTICS).read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_a_refused_step_says_so(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    """Weights that are not finite: the step is skipped, nothing is updated, and the NaN is seen, not passed over."""
    trainer = make_trainer(looking(config, 1, steps=1), tmp_path)
    trainer.parameters["blocks.1.mlp_up.weight"][0, 0] = np.nan
    with pytest.raises(UserError, match=r"blocks\.1\.mlp_up\.weight holds numbers that are not finite"):
        trainer.train()  # nor are such weights saved
    (look,) = read_metrics(tmp_path / DIAGNOSTICS)
    assert look["skipped"] == "non-finite loss (nan)"
    assert all(found["update"] == 0 for name, found in look["parameters"].items() if name != "blocks.1.mlp_up.weight")
    assert math.isnan(look["activations"]["hidden"][1])
    assert math.isfinite(look["activations"]["hidden"][0])
    assert math.isnan(look["activations"]["logits"][0])
    assert "NaN" not in (tmp_path / DIAGNOSTICS).read_text()
    json.loads((tmp_path / DIAGNOSTICS).read_text())


def test_the_largest_of_several_workspaces(make_trainer: MakeTrainer, config: Config) -> None:
    """Whichever thread had it; and a NaN wins wherever it stands."""
    trainer = make_trainer(without_dropout(config), backend=get_backend("numpy", workers=3))
    host_step(trainer).loss_and_gradients(0)
    activations = trainer.workers.activations
    assert len(activations) == 3
    found = largest_activations(trainer.model, activations)
    separate = [largest_activations(trainer.model, [w]) for w in activations]
    for kind, values in found.items():
        assert values == [max(column) for column in zip(*(one[kind] for one in separate), strict=True)]
    assert len({one["qkv"][0] for one in separate}) > 1
    assert math.isnan(largest([math.nan, 1.0]))
    assert math.isnan(largest([1.0, math.nan]))


def test_crystalline_attention(make_trainer: MakeTrainer, config: Config, tmp_path: Path) -> None:
    """Every parameter of the model has an entry, the lattice's scalars too."""
    model = dataclasses.replace(config.model, attention="crystalline")
    config = looking(dataclasses.replace(config, model=model), 1, steps=2)
    trainer = make_trainer(config, tmp_path)
    trainer.train()
    look = read_metrics(tmp_path / DIAGNOSTICS)[-1]
    assert {"blocks.0.lattice_scalars", "blocks.1.lattice_scalars"} < set(look["parameters"])
    in_blocks = ("attention_residual", "qkv", "lse", "attended", "mlp_residual", "hidden", "activated")
    assert all(len(look["activations"][kind]) == 2 for kind in in_blocks)


def test_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.diagnose_every is -1; it must be at least 0"):
        Config(training=TrainingConfig(diagnose_every=-1))
