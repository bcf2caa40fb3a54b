"""`train --resume`: what it goes on from, and what it refuses before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cllm_gpu.checkpoint.checkpoint import load_checkpoint
from cllm_gpu.config import load_toml

Command = Callable[..., tuple[int, str, str]]
Flags = tuple[str, ...]
EVERY_TWO = ("--training.steps", "6", "--training.checkpoint-every", "2", "--training.keep-last", "3")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_with_a_flipped_bit_is_passed_over(
    command: Command, workplace: Path, small: Flags, name: str
) -> None:
    assert command("train", *small, *EVERY_TWO)[0] == 0
    run = workplace / "runs" / "001"
    before = load_checkpoint(run)
    flip(run / "checkpoints" / "step_00000006" / name)
    status, out, err = command("train", "--resume")
    assert (status, err) == (0, "")
    assert re.search(rf"{name} is damaged: .* \(passed over\)", out)
    assert "resumed runs/001 at step 4" in out
    after = load_checkpoint(run)
    assert all(after.parameters[n].tobytes() == x.tobytes() for n, x in before.parameters.items())


def test_resuming_from_a_named_checkpoint(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, *EVERY_TWO)[0] == 0
    run = workplace / "runs" / "001"
    shutil.copytree(run, workplace / "copy")
    before = load_checkpoint(run)
    for flags in (
        ("--checkpoint", "step_00000002"),
        ("--checkpoint", "runs/001/checkpoints/step_00000002"),
        ("--output", "runs/001", "--checkpoint", str(run / "checkpoints" / "step_00000002")),
    ):
        shutil.rmtree(run)
        shutil.copytree(workplace / "copy", run)
        status, out, err = command("train", "--resume", *flags)
        assert (status, err) == (0, "")
        assert "resumed runs/001 at step 2" in out
        after = load_checkpoint(run)
        assert all(after.parameters[n].tobytes() == x.tobytes() for n, x in before.parameters.items())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--checkpoint", "step_00000002"], "add --resume"),
        (
            ["--resume", "--checkpoint", "step_00000003"],
            "no checkpoint step_00000003; its checkpoints, newest first: s",
        ),
        (["--resume", "--checkpoint", "runs/001/step_00000002"], "is no checkpoint of a run"),
        (["--resume", "--output", "other", "--checkpoint", "runs/001/checkpoints/step_00000002"], "leave --output out"),
        (["--resume", "--checkpoint", "step_00000004"], "is damaged"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(
    command: Command, workplace: Path, small: Flags, flags: list[str], expected: str
) -> None:
    assert command("train", *small, *EVERY_TWO)[0] == 0
    flip(workplace / "runs" / "001" / "checkpoints" / "step_00000004" / "model.safetensors")
    before = content(workplace / "runs" / "001")
    status, _, err = command("train", *flags)
    assert status == 2
    assert expected in err
    assert err.count("\n") == 1, err
    assert content(workplace / "runs" / "001") == before


def test_the_checkpoint_decides_on_the_configuration(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "2")[0] == 0
    path = workplace / "runs" / "001" / "config.toml"
    sound = path.read_text()
    for damaged, said in (
        (sound.replace("rate = 0.002", "rate = 0.003"), r"differs in optimizer.rate \(0.003 there, 0.002 here\)"),
        (sound.replace("rate = 0.002", "rate = 0,002"), r"is not valid TOML"),
        (None, "config.toml is missing"),
    ):
        path.unlink()
        if damaged is not None:
            path.write_text(damaged)
        status, out, err = command("train", "--resume")
        assert (status, err) == (0, "")
        assert re.search(said + ".*: the checkpoint's configuration is taken", out)
        assert path.read_text() == sound


def test_a_run_is_resumed_from_another_working_directory(
    command: Command, workplace: Path, small: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without the cache, from the text: its path in the run is absolute."""
    assert command("train", *small, "--training.steps", "2")[0] == 0
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")
    shutil.rmtree(workplace / "cache")
    status, _, err = command("train", "--resume", "--output", "../runs/001", "--training.steps", "3")
    assert (status, err) == (0, "")
    assert load_checkpoint(workplace / "runs" / "001").step == 3
    assert load_toml(workplace / "runs" / "001" / "config.toml").data.source == str(workplace / "text.txt")


def test_a_run_goes_on_with_its_records_and_its_own_validation_text(
    command: Command, workplace: Path, small: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the prepared tokens where they are, whatever became of the files, and from another folder."""
    records = [json.dumps({"body": f"<end>one {n}<end>two {n} " + "abc " * 20}) for n in range(50)]
    (workplace / "records.jsonl").write_text("\n".join(records), encoding="utf-8")
    (workplace / "held.jsonl").write_text("\n".join(records[:5]), encoding="utf-8")
    text = ("--data.source", "records.jsonl", "--data.validation", "held.jsonl")
    text += ("--data.text-field", "body", "--data.separator", "<end>")
    assert command("train", *small, *text, "--training.steps", "2")[0] == 0
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")
    resume = ("train", "--resume", "--output", "../runs/001", "--training.steps")
    status, out, err = command(*resume, "3")
    assert (status, err) == (0, "")
    assert "goes on with the tokens" not in out
    (workplace / "held.jsonl").unlink()
    status, out, err = command(*resume, "4")
    assert (status, err) == (0, "")
    assert "held.jsonl" in out
    assert "training goes on with the tokens prepared from it then, in " in " ".join(out.split())


def test_fewer_steps_than_are_done_and_another_seed_are_refused(
    command: Command, workplace: Path, small: Flags
) -> None:
    assert command("train", *small, *EVERY_TWO)[0] == 0
    before = content(workplace / "runs" / "001")
    for flags, expected in (
        (("--training.steps", "5"), "training.steps is 5, but the checkpoint is at step 6: give at least 6, or an ear"),
        (("--training.seed", "2", "--training.steps", "8"), "training.seed is 2, but the run has seed 1"),
    ):
        status, _, err = command("train", "--resume", *flags)
        assert status == 2
        assert expected in err
        assert err.count("\n") == 1, err
        assert content(workplace / "runs" / "001") == before


def test_another_runs_checkpoint_is_passed_over_and_stays(command: Command, workplace: Path, small: Flags) -> None:
    for seed, steps in (("1", "2"), ("2", "4")):
        assert command("train", *small, "--training.steps", steps, "--training.seed", seed)[0] == 0
    runs = workplace / "runs"
    foreign = runs / "001" / "checkpoints" / "step_00000004"
    shutil.copytree(runs / "002" / "checkpoints" / "step_00000004", foreign)
    status, out, err = command("train", "--resume", "--output", "runs/001", "--training.steps", "3")
    assert (status, err) == (0, "")
    assert "step_00000004 is a checkpoint of another run, not of runs/001" in out
    assert "resumed runs/001 at step 2" in out
    assert foreign.is_dir()  # it is not this run's to remove
    status, _, err = command("train", "--resume", "--output", "runs/001", "--checkpoint", "step_00000004")
    assert status == 2
    assert "is a checkpoint of another run" in err
    assert command("evaluate", "text.txt", "--model", "runs/001", "--json")[0] == 0
    (runs / "001" / "run.id").write_text("0" * 32 + "\n")  # damaged: the checkpoint's stands
    shutil.rmtree(foreign)
    assert command("train", "--resume", "--output", "runs/001", "--training.steps", "4")[0] == 0
    assert (runs / "001" / "run.id").read_text() != (runs / "002" / "run.id").read_text()
    assert load_checkpoint(runs / "001").state["run"] in (runs / "001" / "run.id").read_text()
