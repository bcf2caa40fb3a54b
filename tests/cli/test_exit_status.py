"""What a script can rely on: the exit statuses that `cllm-gpu --help` and docs/command-line.md list are those given."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cllm_gpu.cli import STATUSES

Command = Callable[..., tuple[int, str, str]]
PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"


def test_the_statuses_are_documented(command: Command) -> None:
    _, usage, _ = command("--help")
    listed = {
        int(number): text for number, text in re.findall(r"^ +(\d+)  (.+)$", usage.partition("exit status:")[2], re.M)
    }
    assert listed == STATUSES
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert {int(number): text for number, text in rows} == STATUSES


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["gradcheck", "--model.layers", "1", "--model.width", "8", "--length", "3"], 0),
        (["gradcheck", "--model.layers", "1", "--model.width", "8", "--length", "3", "--bound", "1e-300"], 1),
        ([], 2),
        (["nonsense"], 2),
        (["evaluate", "nowhere.txt"], 2),
        (["gradcheck", "--backend", "simulator"], 2),
    ],
)
def test_status(command: Command, arguments: list[str], status: int) -> None:
    assert command(*arguments)[0] == status
    assert status in STATUSES


def test_interrupted_where_nothing_is_saved(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """In train, which saves, see test_control_c_saves_and_says_how_to_resume."""

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cllm_gpu.cli.evaluate.load_pretrained", press)
    assert command("evaluate", "text.txt", "--model", "x") == (130, "", "cllm-gpu: interrupted\n")
