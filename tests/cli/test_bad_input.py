"""Bad input from the command line: one clear line on standard error, status 2, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cllm_gpu.training.run_folder import lock_run

Command = Callable[..., tuple[int, str, str]]
Flags = tuple[str, ...]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.layrs", "3"], "did you mean --model.layers"),
        (["--model.layers", "many"], "--model.layers"),
        (["--optimizer.name", "adma"], "--optimizer.name"),
        (["--model.heads", "3"], "does not divide"),
        (["--optimizer.rate", "-1"], "optimizer.rate is -1.0; it must be above 0"),
        (["--optimizer.rate", "nan"], "optimizer.rate is nan"),
        (["--training.micro-batch", "3"], "does not divide training.batch 4"),
        (["--model.dropout", "1.0"], "model.dropout"),
        (["--data.source", "nowhere.txt"], "nowhere.txt"),
        (["--data.source", "empty.txt"], "empty.txt"),
        (["--data.source", "latin.txt"], "latin.txt"),
        (["--model.context", "100000"], "too few for a context of 100000"),
        (["--data.tokenizer", "none.json"], "none.json"),
        (["--backend", "cuda"], "choose one of"),
        (["--config", "none.toml"], "none.toml does not exist"),
        (["--config", "bad.toml"], "bad.toml: unknown key model.layrs; did you mean layers?"),
        (["--config", "torn.toml"], "torn.toml is not valid TOML"),
        (["--resume"], "no run in"),
        (["--resume", "--output", "elsewhere"], "elsewhere holds no run"),
        (["--training.steps", "0"], "training.steps is 0; it must be at least 1"),
        (["surplus"], "surplus"),
        (["--resume=true"], "unexpected argument 'true'"),
        (["--data.source", ""], "data.source is empty"),
        (["--data.source", "~nosuchuser/x"], "~nosuchuser/x"),
        (["--output", "."], "a folder of its own"),
        (["--initial", "elsewhere"], "elsewhere does not exist"),
        (["--data.tokenizer", "initial"], "give --initial"),
        (["--resume", "--initial", "elsewhere"], "leave --initial out"),
        (["--model.size", "custom"], "does not say model.heads: give it too"),
    ],
)
def test_train(command: Command, workplace: Path, small: Flags, flags: list[str], expected: str) -> None:
    (workplace / "empty.txt").write_bytes(b"")
    (workplace / "latin.txt").write_bytes(b"caf\xe9 " * 200)
    (workplace / "bad.toml").write_text("[model]\nlayrs = 3\n")
    (workplace / "torn.toml").write_text("[model\n")
    status, _, err = command("train", *(small if "--resume" not in flags else ()), *flags)
    assert status == 2
    assert expected in err
    assert err.startswith("cllm-gpu: error: ")
    assert err.count("\n") == 1, err
    assert not list(workplace.glob("runs/*/checkpoints/*"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean train"),
        (["generate", "x"], "no run in"),
        (["generate", "x", "--model", "nowhere"], "nowhere"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--top-p", "0"], "top-p"),
        (["evaluate"], "SOURCE"),
        (["evaluate", "text.txt", "--batch", "0"], "--batch 0"),
        (["gradcheck", "--model.heads", "5"], "does not divide"),
        (["report", "nowhere"], "nowhere"),
        (["report", "nowhere", "--html", "page.html"], "nowhere"),
        (["compare", "--optimizers", "adma"], "--optimizers"),
        (["info", "--backend", "tpu"], "choose one of"),
        (["import"], "DIR"),
        (["import", "nowhere"], "config.json does not exist"),
        (["import", "nowhere", "--tokenizer", "none.json"], "none.json"),
        (["export", "nowhere", "--output", "out"], "nowhere does not exist"),
        (["export", "nowhere"], "--output"),
    ],
)
def test_other_commands(command: Command, arguments: list[str], expected: str) -> None:
    status, _, err = command(*arguments)
    assert status == 2
    assert expected in err
    assert err.startswith("cllm-gpu: error: ")
    assert err.count("\n") == 1, err


def test_a_changed_checkpoint_is_refused(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "2")[0] == 0
    weights = next(workplace.glob("runs/001/checkpoints/*/model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    for arguments in (["generate", "x"], ["evaluate", "text.txt"], ["train", "--resume"]):
        status, _, err = command(*arguments)
        assert status == 2
        assert "model.safetensors" in err
        assert err.count("\n") == 1, err


def test_a_refused_resume_changes_nothing(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "2")[0] == 0
    before = (workplace / "runs" / "001" / "config.toml").read_text()
    status, _, err = command("train", "--resume", "--model.width", "32")
    assert status == 2
    assert "of another model" in err
    assert (workplace / "runs" / "001" / "config.toml").read_text() == before
    assert command("train", "--resume", "--training.steps", "3")[0] == 0


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_word(
    command: Command, workplace: Path, small: Flags
) -> None:
    assert command("train", *small, "--training.steps", "4", "--training.checkpoint-every", "2")[0] == 0
    manifest = workplace / "runs" / "001" / "checkpoints" / "step_00000004" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"adamw", b"adamx"))
    status, out, _ = command("train", "--resume")
    assert status == 0
    assert "step_00000004" in out
    assert "passed over" in out
    assert "at step 2" in out


def test_only_one_process_trains_in_a_folder(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "2")[0] == 0
    with lock_run(workplace / "runs" / "001"):
        status, _, err = command("train", "--resume", "--training.steps", "3")
    assert status == 2
    assert "another process is training in" in err
    assert command("train", "--resume", "--training.steps", "3")[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_standard_output_on_a_full_disk(workplace: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cllm_gpu", "info"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr.startswith("cllm-gpu: error: ")
    assert done.stderr.count("\n") == 1


def test_characters_the_terminal_cannot_show(workplace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cllm_gpu", "generate", "é", "--model", "λ"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "cllm-gpu: error: checkpoint ? does not exist; give the folder of a run or of a checkpoint\n"


def test_a_folder_that_cannot_be_written(
    command: Command, workplace: Path, small: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "file").write_text("in the way")
    status, _, err = command("train", *small, "--output", "file/run")
    assert status == 2
    assert "file" in err
    assert err.count("\n") == 1, err


def test_out_of_memory_is_one_line(command: Command, small: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 9.9 TiB")

    monkeypatch.setattr("cllm_gpu.cli.train.Trainer", refuse)
    status, _, err = command("train", *small)
    assert status == 2
    assert "out of memory" in err
    assert err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe nobody reads is a POSIX matter")
def test_standard_output_that_nobody_reads(workplace: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "cllm_gpu", "info"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
