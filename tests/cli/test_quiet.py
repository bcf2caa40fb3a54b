"""--quiet: no progress and no messages, but errors, and results that are written to no file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from cllm_gpu.training.metrics import read_metrics

Command = Callable[..., tuple[int, str, str]]
Flags = tuple[str, ...]


def test_train_leaves_its_folder_and_says_nothing(command: Command, workplace: Path, small: Flags) -> None:
    flags = ("--training.steps", "4", "--training.sample-every", "2")
    assert command("train", *small, *flags, "--quiet") == (0, "", "")
    assert command("train", *small, *flags)[1] != ""
    quiet, loud = ({p.relative_to(run) for p in run.rglob("*")} for run in sorted(Path("runs").iterdir()))
    assert quiet == loud
    kinds = [[r["kind"] for r in read_metrics(Path("runs", run, "metrics.jsonl"))] for run in ("001", "002")]
    assert kinds[0] == kinds[1]
    assert kinds[0].count("sample") == 2
    assert command("train", "--resume", "--output", "runs/001", "--training.steps", "5", "-q") == (0, "", "")


def test_tokenize_and_compare(command: Command, workplace: Path, small: Flags) -> None:
    assert command("tokenize", "text.txt", "--vocabulary", "300", "--shards", "shards", "-q") == (0, "", "")
    assert Path("tokenizer.json").is_file()
    assert Path("shards", "train.tokens").is_file()
    flags = ("--training.steps", "2", "--optimizers", "sgd", "--output", "compared")
    assert command("compare", *small, *flags, "-q") == (0, "", "")
    assert Path("compared", "comparison.md").is_file()


def test_a_result_is_shown(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "2", "--quiet")[0] == 0
    found = command("evaluate", "text.txt")
    assert found[1].startswith("loss ")
    assert command("evaluate", "text.txt", "--quiet") == found
    status, out, err = command("tokenize", "text.txt", "--tokenizer", "bytes", "--quiet")
    assert (status, out, err) == (0, "bytes: vocabulary 257, bytes per token: 1.000 training, 0.999 validation\n", "")


def test_an_error_is_shown(command: Command, workplace: Path) -> None:
    status, out, err = command("train", "--data.source", "nowhere.txt", "--quiet")
    assert (status, out) == (2, "")
    assert "nowhere.txt" in err


@pytest.mark.parametrize(("flags", "level"), [((), logging.INFO), (("--quiet",), logging.WARNING)])
def test_notices_from_below(command: Command, workplace: Path, flags: Flags, level: int) -> None:
    """That something is compiled is logged as INFO; a terminal's handler is there for whoever looks on."""
    command("evaluate", "text.txt", *flags)
    assert logging.getLogger("cllm_gpu.utils.compiler").getEffectiveLevel() == level
