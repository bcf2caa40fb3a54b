"""make profile: what it runs, and what it says where a tool or a card is missing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.training import nsight
from cllm_gpu.devices import driver as gpu


def test_without_nsys_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(nsight, "_candidates", lambda: iter([Path("/nowhere/nsys")]))
    assert nsight.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: Nsight Systems is not installed: install nsight-systems")
    assert error.count("\n") == 1


def test_without_a_card_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(nsight, "find_nsys", lambda: Path("nsys"))
    monkeypatch.setattr(gpu, "find_driver", lambda: None)
    assert nsight.main([]) == 1
    assert capsys.readouterr().err.startswith("error: no card to profile: no NVIDIA driver found")


@pytest.mark.parametrize("failing", [None, "profile", "stats"])
def test_both_commands_run_and_a_failure_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str | None
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 3 if command[1] == failing else 0)

    monkeypatch.setattr(nsight, "find_nsys", lambda: Path("nsys"))
    monkeypatch.setattr(gpu, "missing", lambda driver, has_cupy: None)
    monkeypatch.setattr(nsight.subprocess, "run", run)
    status = nsight.main(["--steps", "5", "--output", str(tmp_path / "p" / "t"), "--", "--model.size", "gpt2"])
    assert status == (3 if failing else 0)
    assert [command[1] for command in commands] == (["profile"] if failing == "profile" else ["profile", "stats"])
    assert commands[0][-2:] == ["--model.size", "gpt2"]


def test_the_profiled_command_line_is_one_the_trainer_takes(tmp_path: Path) -> None:
    """The very flags, parsed by `cllm-gpu train`: a flag that is renamed shows here."""
    from cllm_gpu.cli.train import COMMAND

    command = nsight.profile_command(Path("nsys"), tmp_path / "out", tmp_path / "run", 7, [])
    flags = command[command.index("train") + 1 :]
    options = COMMAND.parse(flags)
    loop = options.settings.training
    assert (loop.steps, loop.evaluate_every, loop.checkpoint_every, loop.sample_tokens) == (7, 0, 0, 0)


def test_the_page_names_every_range() -> None:
    """Every name given to `ranges(…)` in the package: its first part, in backquotes, in docs/profiling.md."""
    root = Path(nsight.ROOT)
    page = (root / "docs" / "profiling.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in sorted((root / "cllm_gpu").rglob("*.py"))]
    names = {name.split("/")[0] for text in sources for name in re.findall(r'\branges\(f?"([^"]+)"\)', text)}
    assert {"data", "forward", "loss", "backward", "optimizer"} <= names
    assert sorted(name for name in names if f"`{name}" not in page) == []


def test_one_step_is_too_few(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        nsight.parse(["--steps", "1"])
    assert "at least 2 are needed" in capsys.readouterr().err
