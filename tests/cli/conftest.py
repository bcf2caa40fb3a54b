"""The command as a user runs it: in the same process where that is enough, in one of its own where it is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cllm_gpu.cli import run

TEXT = "".join(f"The number {i} squared is {i * i}.\n" for i in range(600))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with a text and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CLLM_BACKEND", "numpy")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def command(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """command("train", "--resume", …): (exit status, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = run(list(arguments))
        out, err = capsys.readouterr()
        return status, out, err

    return call


SMALL = (
    "--data.source", "text.txt", "--model.size", "tiny", "--model.layers", "1", "--model.width", "16",
    "--model.context", "16", "--training.batch", "4", "--training.evaluate-every", "0",
    "--training.evaluation-batches", "2", "--training.sample-tokens", "20",
)  # fmt: skip


@pytest.fixture
def small() -> tuple[str, ...]:
    """Flags of a run that takes no time."""
    return SMALL
