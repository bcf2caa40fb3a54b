"""Commands in a real terminal (a pty) of 40 and 80 columns, as programs of their own."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

Flags = tuple[str, ...]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="not run: Windows has no pty")


def in_terminal(columns: int, *arguments: str) -> tuple[int, list[str]]:
    """Exit status, and every line shown, those written over later too, without colours and movements."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "cllm_gpu", *arguments],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        env=environment | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:  # how Linux says that nobody holds the other side any more
        pass
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    return process.wait(timeout=60), [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.parametrize("columns", [40, 80])
def test_train(workplace: Path, small: Flags, columns: int) -> None:
    status, lines = in_terminal(columns, "train", *small, "--training.steps", "3", "--training.sample-tokens", "0")
    assert status == 0
    assert max(map(len, lines)) <= columns
    live = [line for line in lines if re.match(r"3/3 loss \d+\.\d{3}", line)]
    assert live
    assert "…" not in "".join(lines)
    assert any(line.startswith("3 steps in ") for line in lines)


def test_quiet(workplace: Path, small: Flags) -> None:
    assert in_terminal(80, "train", *small, "--training.steps", "2", "--quiet") == (0, [])
    status, lines = in_terminal(80, "evaluate", "text.txt", "--quiet")
    assert status == 0
    assert lines[0].startswith("loss ")
    assert "evaluating" not in " ".join(lines)


def test_an_error_breaks_between_words(workplace: Path) -> None:
    status, lines = in_terminal(40, "evaluate", "text.txt", "--model", "nowhere")
    assert status == 2
    assert max(map(len, lines)) <= 40
    expected = "cllm-gpu: error: checkpoint nowhere does not exist; give the folder of a run or of a checkpoint"
    assert " ".join(lines) == expected
