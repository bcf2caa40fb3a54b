"""import, export and training that begins from a model, from the shell's point of view."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cllm_gpu.checkpoint.checkpoint import load_checkpoint, load_model
from cllm_gpu.checkpoint.safetensors_io import read_tensors, write_tensors
from cllm_gpu.config import load_toml

Command = Callable[..., tuple[int, str, str]]
Flags = tuple[str, ...]
FEW = ("--data.source", "text.txt", "--training.batch", "4", "--training.evaluate-every", "0",
       "--training.evaluation-batches", "2", "--training.sample-tokens", "5")  # fmt: skip


@pytest.fixture
def small(small: Flags) -> Flags:
    """What GPT-2 can express."""
    return (*small, "--model.attention", "standard")


def test_export_and_import_give_the_same_model(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "3")[0] == 0
    status, out, err = command("export", "runs/001", "--output", "gpt2")
    assert (status, err) == (0, "")
    assert "exported step 3 of" in out
    status, out, err = command("import", "gpt2")
    assert (status, err) == (0, "")
    assert "1 layers, width 16, 2 heads, context 16, vocabulary 257" in out
    assert f"run folder {Path('runs/002')}" in out
    first, second = (load_model(workplace / "runs" / name).parameters for name in ("001", "002"))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    for arguments in (["generate", "The", "--tokens", "12"], ["evaluate", "text.txt", "--batches", "2", "--json"]):
        assert command(*arguments, "--model", "runs/001")[1] == command(*arguments, "--model", "runs/002")[1]
    status, _, err = command("import", "gpt2", "--output", "runs/001")
    assert status == 2
    assert "already holds a run" in err


def test_a_refused_import_leaves_no_run(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "1")[0] == 0
    assert command("export", "runs/001", "--output", "gpt2")[0] == 0
    settings = json.loads((workplace / "gpt2" / "config.json").read_text())
    (workplace / "gpt2" / "config.json").write_text(json.dumps(settings | {"activation_function": "relu"}))
    status, _, err = command("import", "gpt2")
    assert status == 2
    assert "activation_function is 'relu'" in err
    assert err.count("\n") == 1
    assert [path.name for path in (workplace / "runs").iterdir()] == ["001"]


def test_crystalline_attention_is_not_exported(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "1", "--model.attention", "crystalline")[0] == 0
    status, _, err = command("export", "runs/001", "--output", "gpt2")
    assert status == 2
    assert "attention is crystalline, GPT-2 has only standard" in err
    assert err.count("\n") == 1
    assert not (workplace / "gpt2").exists()


def test_fine_tuning(command: Command, workplace: Path, small: Flags) -> None:
    """From an import with its own shape, then resumed after the model it began from has gone."""
    assert command("train", *small, "--training.steps", "2")[0] == 0
    assert command("export", "runs/001", "--output", "gpt2")[0] == 0
    assert command("import", "gpt2", "--output", "imported")[0] == 0
    flags = ("--initial", "imported", *FEW, "--training.steps", "3", "--optimizer.rate", "1e-9")
    status, out, err = command("train", *flags)
    assert (status, err) == (0, "")
    assert "training begins from the model in imported, step 0" in out
    saved = load_toml(workplace / "runs" / "002" / "config.toml")
    assert saved.initial == workplace / "imported"
    assert (saved.model.size, saved.model.layers, saved.model.width, saved.model.vocabulary) == ("custom", 1, 16, 257)
    tuned, before = load_checkpoint(workplace / "runs" / "002"), load_model(workplace / "imported")
    assert tuned.step == 3
    assert all(np.allclose(tuned.parameters[n], before.parameters[n], rtol=0, atol=1e-7) for n in before.parameters)
    shutil.rmtree(workplace / "imported")
    status, out, err = command("train", "--resume", "--training.steps", "5")
    assert (status, err) == (0, "")
    assert "at step 3" in out
    assert load_checkpoint(workplace / "runs" / "002").state["initial"]["path"] == str(workplace / "imported")


def test_the_models_own_tokenizer_and_room_for_more_tokens(command: Command, workplace: Path, small: Flags) -> None:
    """A vocabulary padded above the tokenizer's, and a tokenizer.json that travels with the run."""
    assert command("train", *small, "--training.steps", "1")[0] == 0
    assert command("export", "runs/001", "--output", "gpt2")[0] == 0
    folder = workplace / "gpt2"
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"vocab_size": 320}))
    tensors = read_tensors(folder / "model.safetensors")
    padded = np.concatenate([tensors["transformer.wte.weight"], np.zeros((63, 16), np.float32)])
    write_tensors(folder / "model.safetensors", tensors | {"transformer.wte.weight": padded})
    other = json.loads((folder / "tokenizer.json").read_text())
    other["pre_tokenizer"]["add_prefix_space"] = True  # no longer our bytes
    (folder / "tokenizer.json").write_text(json.dumps(other))
    assert command("import", "gpt2", "--output", "imported")[0] == 0
    assert load_model(workplace / "imported").tokenizer["kind"] == "huggingface"
    shutil.rmtree(folder)
    assert command("train", "--initial", "imported", *FEW, "--training.steps", "2")[0] == 0
    assert load_toml(workplace / "runs" / "002" / "config.toml").data.tokenizer == "initial"
    shutil.rmtree(workplace / "imported")
    assert command("train", "--resume", "--training.steps", "3")[0] == 0
    assert load_checkpoint(workplace / "runs" / "002").architecture["vocabulary"] == 320
    assert command("generate", "The", "--tokens", "5")[0] == 0


def test_settings_over_the_model_come_from_file_and_flags(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "1")[0] == 0
    (workplace / "tune.toml").write_text('initial = "runs/001"\n[model]\ndropout = 0.25\n[optimizer]\nrate = 0.5\n')
    assert command("train", "--config", "tune.toml", *FEW, "--training.steps", "2", "--optimizer.rate", "0.25")[0] == 0
    saved = load_toml(workplace / "runs" / "002" / "config.toml")
    assert (saved.model.width, saved.model.dropout, saved.optimizer.rate) == (16, 0.25, 0.25)
    (workplace / "tune.toml").write_text('initial = "runs/001"\n[model]\nwidth = 32\n')
    for flags, expected in (
        (
            ["--config", "tune.toml"],
            "model.width is 32, but training begins from the model",
        ),
        (["--initial", "runs/001", "--model.size", "gpt2"], "model.size gpt2 has layers 12"),
        (["--initial", "runs/001", "--model.heads", "4"], "model.heads is 4"),
        (["--initial", "runs/001", "--data.tokenizer", "patterns"], "data.tokenizer is patterns ("),
        (["--resume", "--output", "nothing"], "nothing holds no run"),
    ):
        status, _, err = command("train", *flags)
        assert status == 2
        assert expected in err
        assert err.count("\n") == 1


def test_an_import_cannot_be_resumed_but_says_what_can(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "1")[0] == 0
    assert command("export", "runs/001", "--output", "gpt2")[0] == 0
    assert command("import", "gpt2", "--output", "imported")[0] == 0
    status, _, err = command("train", "--resume", "--output", "imported")
    assert status == 2
    assert "--initial imported" in err
