"""Runs that cllm-gpu 0.1 wrote (tests/fixtures/run-0.1): this version opens them, and continues them bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cllm_gpu.checkpoint.checkpoint import load_checkpoint
from cllm_gpu.cli import run
from cllm_gpu.config import as_dict, load_toml
from cllm_gpu.training.metrics import read_metrics

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "run-0.1"
RUNS = ("adamw", "sgd")
STEPS = 10
TIMES = {"seconds", "tokens_per_second"}

ARITHMETIC = "a8b6d7ed601f011c44e280dee6072f56e62e1792fc511429054c14b74d887689"
"""`arithmetic_fingerprint` of the machine on which the runs were made."""

Command = Callable[..., str]


def arithmetic_fingerprint() -> str:
    """SHA-256 of what NumPy and its BLAS compute here: other processors sum and round in other ways."""
    generator, digest = np.random.default_rng(1), hashlib.sha256()
    for rows, inner, columns in ((32, 8, 24), (32, 8, 257), (16, 4, 16), (8, 64, 24), (257, 64, 8), (64, 32, 8)):
        a = generator.standard_normal((rows, inner), dtype=np.float32)
        b = generator.standard_normal((inner, columns), dtype=np.float32)
        for x in (a @ b, np.exp(a), np.tanh(a), np.log(np.abs(a)), np.sum(a, axis=-1), np.mean(b), np.sqrt(np.abs(b))):
            digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """command("evaluate", …): the standard output of a command that succeeds, in a copy of the fixtures."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CLLM_BACKEND", "numpy")

    def call(*arguments: str) -> str:
        status = run(list(arguments))
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return out

    return call


def _untimed(run: Path) -> list[dict[str, Any]]:
    """The run's records without what a clock says."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(run / "metrics.jsonl")]


def _without_additions(found: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """`found` without the options that a later version may have added."""
    parts = {name: value for name, value in found.items() if name in saved}
    return {k: _without_additions(v, saved[k]) if isinstance(v, dict) else v for k, v in parts.items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_with_the_weights_it_had_then(command: Command, tmp_path: Path, name: str) -> None:
    """The same bits where NumPy computes as it did there; elsewhere as near as four steps of other roundings stay."""
    assert "resumed" in command("train", "--resume", "--output", name)
    checkpoint = load_checkpoint(tmp_path / name)
    assert checkpoint.step == STEPS
    expected = load_file(FIXTURES / f"{name}-step-{STEPS}.safetensors")
    assert checkpoint.parameters.keys() == expected.keys()
    got, wanted = _untimed(tmp_path / name), _untimed(FIXTURES / name)
    same_arithmetic = arithmetic_fingerprint() == ARITHMETIC
    assert len(got) == len(wanted)
    assert got == wanted or not same_arithmetic
    for parameter, x in expected.items():
        found = checkpoint.parameters[parameter]
        assert found.dtype == x.dtype
        assert found.tobytes() == x.tobytes() or not same_arithmetic, parameter
        assert np.allclose(found, x, rtol=0, atol=1e-4), parameter


@pytest.mark.parametrize("name", RUNS)
def test_its_commands_open_it(command: Command, tmp_path: Path, name: str) -> None:
    found = json.loads(command("evaluate", "text.txt", "--model", name, "--json"))
    assert found["tokens"] == len((tmp_path / "text.txt").read_bytes()) + 1  # and the end of text
    assert 4.5 < found["loss"] < 5.6
    assert command("generate", "A wall", "--model", name, "--tokens", "5").startswith("A wall")
    assert str(STEPS) in command("report", name, "--output", "tables")
    assert (tmp_path / "tables" / "report.md").is_file()


@pytest.mark.parametrize("name", RUNS)
def test_its_configuration_is_one(command: Command, tmp_path: Path, name: str) -> None:
    config = load_toml(tmp_path / name / "config.toml")
    assert (config.training.steps, config.training.batch, config.model.width) == (STEPS, 4, 8)
    assert (config.optimizer.name, config.model.dropout) == (name, 0.1 if name == "adamw" else 0.0)
    assert config.model.positions == ("learned" if name == "adamw" else "rope")
    saved = json.loads((tmp_path / name / "checkpoints" / "step_00000006" / "manifest.json").read_text("utf-8"))
    assert _without_additions(as_dict(config), saved["config"]) == saved["config"]
    command("train", "--config", f"{name}/config.toml", "--training.steps", "1", "--output", "anew")
    assert load_checkpoint(tmp_path / "anew").step == 1
