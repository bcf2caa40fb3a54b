"""What train says of memory: levels, the batch it chose, and what would fit where it is short."""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.cli import run
from cllm_gpu.training.run_folder import load_configuration

Command = Callable[..., tuple[int, str, str]]
Flags = tuple[str, ...]


LARGER = ("--model.width", "64", "--model.context", "64", "--training.batch", "16", "--training.workers", "1")


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def test_the_levels_stand_below_the_plan(command: Command, workplace: Path, small: Flags) -> None:
    plans = {}
    for level in ("none", "pointwise", "block"):
        status, out, _ = command(
            "train", *small, "--training.steps", "1", "--model.layers", "3", "--training.recompute", level
        )
        assert status == 0
        size = r"([\d.]+ [kM]B)"
        said = re.search(
            rf"^recompute {level}; activations by level: none {size}, pointwise {size}, block {size}$", out, re.M
        )
        assert said is not None
        plans[level] = said.groups()
        shown = re.search(rf"^ activations +{size}", out, re.M)
        assert shown is not None
        assert shown[1] == said[1 + ("none", "pointwise", "block").index(level)]
    assert len(set(plans.values())) == 1
    losses = [[record["loss"] for record in steps(Path(f"runs/00{number}"))] for number in (1, 2, 3)]
    assert losses[0] == losses[1] == losses[2]


def test_the_batch_that_was_chosen_is_kept(command: Command, workplace: Path, small: Flags) -> None:
    status, out, _ = command("train", *small, "--batch", "auto", "--training.steps", "2", "--training.workers", "2")
    assert status == 0
    assert "\nbatch 16: 8 for each worker, as on a CPU more are hardly faster (plan " in out
    assert load_configuration(Path("runs/001")).training.batch == 16
    status, out, _ = command("train", "--resume", "--training.steps", "3", "--training.workers", "1")
    assert (status, "for each worker" in out) == (0, False)
    assert load_configuration(Path("runs/001")).training.batch == 16
    assert [record["tokens"] for record in steps(Path("runs/001"))] == [256, 512, 768]


def test_the_short_name_of_the_batch(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--batch=3", "--training.steps", "1")[0] == 0
    assert load_configuration(Path("runs/001")).training.batch == 3
    status, _, err = command("train", *small, "--batch", "many")
    assert status == 2
    assert err.startswith("cllm-gpu: error: Error parsing --training.batch: ")


def test_other_trainers_names_as_flags(command: Command, workplace: Path, small: Flags) -> None:
    flags = ("--optimizer.lr", "2e-4", "--training.max_steps=1", "--model.n-layer", "2")
    assert command("train", *small, *flags)[0] == 0
    saved = load_configuration(Path("runs/001"))
    assert (saved.optimizer.rate, saved.training.steps, saved.model.layers) == (2e-4, 1, 2)


def test_a_micro_batch_of_its_own(command: Command, workplace: Path, small: Flags) -> None:
    status, out, _ = command("train", *small, "--training.micro-batch", "auto", "--training.steps", "1")
    assert status == 0
    assert "\nmicro-batch 4 of batch 4: all of it fits (plan " in out
    assert load_configuration(Path("runs/001")).training.micro_batch == 4


def _backend_with(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    def chosen(name: str | None, **settings: Any) -> Backend:
        return dataclasses.replace(get_backend(name, **settings), **changes)

    monkeypatch.setattr("cllm_gpu.cli.train.get_backend", chosen)


def test_a_plan_too_large(command: Command, workplace: Path, small: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card refuses before a folder is made; a CPU, which may swap, says so and goes on."""
    flags = (*small, *LARGER, "--training.steps", "1")
    _backend_with(monkeypatch, memory_free=lambda: 9_000_000)
    status, out, _ = command("train", *flags)
    assert status == 0
    line = r"the plan takes [\d.]+ MB, and 9\.0 MB of memory are free: training\.micro_batch \d .* would fit\n"
    assert re.search(line, out)
    _backend_with(monkeypatch, memory_free=lambda: 9_000_000, xp=types.SimpleNamespace())
    status, _, err = command("train", *flags)
    assert status == 2
    assert re.fullmatch(f"cllm-gpu: error: {line}", err)
    assert not Path("runs/002").exists()
    status, _, err = command(
        "train", *flags, "--batch", "auto", "--data.validation-fraction", "0.1", "--model.width", "512"
    )
    assert status == 2
    assert err.startswith("cllm-gpu: error: not even one sequence fits 9.0 MB of free memory, 25% of it in reserve: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Out of memory allocating 9,999 bytes\n(allocated so far: 0 bytes)."),
        RuntimeError("cudaErrorMemoryAllocation: out of memory"),
    ],
)
def test_out_of_memory_names_what_may_fit(
    command: Command, workplace: Path, small: Flags, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    _backend_with(monkeypatch, memory_free=lambda: 8_000_000_000)
    monkeypatch.setattr("cllm_gpu.cli.train.Trainer", refuse)
    status, _, err = command("train", *small, *LARGER)
    assert status == 2
    said = re.escape(str(error).partition("\n")[0])
    assert re.fullmatch(
        rf"cllm-gpu: error: out of memory \({said}\): the plan takes [\d.]+ MB with "
        r"recompute none, 8\.0 GB were free; try training\.micro_batch \d \([\d.]+ MB\).*\n",
        err,
    )


def test_another_error_is_not_taken_for_one(workplace: Path, small: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("cllm_gpu.cli.train.Trainer", refuse)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run(["train", *small])


def test_compare_takes_a_number(command: Command, workplace: Path, small: Flags) -> None:
    status, _, err = command("compare", *small, "--training.batch", "auto", "--training.steps", "2")
    assert status == 2
    assert err == "cllm-gpu: error: training.batch is auto, which only train finds a number for; give one\n"
