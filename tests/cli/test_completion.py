"""Completion: the scripts run in the shells they are for, and know every flag that the help shows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cllm_gpu.backend import NAMES
from cllm_gpu.cli import COMMANDS, load_command
from cllm_gpu.cli.completion import every_flag

Command = Callable[..., tuple[int, str, str]]
CASES = [
    (["tr"], {"train"}),
    (["e"], {"evaluate", "export"}),
    (["train", "--model.s"], {"--model.size"}),
    (["train", "--qu"], {"--quiet"}),
    (["train", "--model.tied-"], {"--model.tied-head"}),
    (["train", "--model.size", "gpt2-"], {"gpt2-medium", "gpt2-large", "gpt2-xl"}),
    (["evaluate", "text.txt", "--checkpoint", ""], {"best", "last"}),
    (["compare", "--optimizers", "ad"], {"adam", "adamw"}),
    (["info", "--backend", "n"], {name for name in NAMES if name.startswith("n")}),
    (["completion", ""], {"bash", "zsh", "fish"}),
]
"""Words after `cllm-gpu`, the last unfinished → what Tab offers."""


@pytest.mark.parametrize("name", COMMANDS)
def test_the_flags_are_those_of_the_help(name: str, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(name, "--help")
    text = capsys.readouterr().out.partition("\nexamples:")[0]
    heads = re.findall(r"^[│ |] (-.*)$", text, re.M)  # what describes a flag stands further to the right
    shown = {word for head in heads for word in re.findall(r"(?:^|, )(--?[a-z][\w.-]*)", head)}
    assert {word for flag in every_flag()[name] for word in flag.names} == shown


def test_what_may_follow_a_flag() -> None:
    flags = {word: flag for flag in every_flag()["train"] for word in flag.names}
    assert flags["--model.size"].choices[:2] == ("tiny", "mini")
    assert flags["--config"].takes_file
    assert not flags["--training.steps"].takes_file
    assert not flags["--resume"].takes_value
    assert flags["--training.batch"].description == "Sequences per step"
    assert flags["--quiet"].names == ("-q", "--quiet")
    assert all(flag.description for of_command in every_flag().values() for flag in of_command)


def shell(name: str) -> str:
    path = shutil.which(name)
    if path is None or sys.platform == "win32":  # what is called bash there may be another system's
        pytest.skip(f"not run: there is no {name} here")
    return path


@pytest.mark.parametrize(("words", "offered"), CASES)
def test_bash(command: Command, workplace: Path, words: list[str], offered: set[str]) -> None:
    script = command("completion", "bash")[1]
    asked = " ".join(f"'{word}'" for word in ["cllm-gpu", *words])
    script += f'COMP_WORDS=({asked}); COMP_CWORD={len(words)}; _cllm_gpu; printf "%s\\n" "${{COMPREPLY[@]}}"\n'
    done = subprocess.run([shell("bash"), "--norc"], input=script, capture_output=True, text=True, check=True)
    assert (set(done.stdout.split()), done.stderr) == (offered, "")


def test_bash_reads_an_equals_sign_and_offers_files_elsewhere(command: Command, workplace: Path) -> None:
    script = command("completion", "bash")[1]
    for words, size in (("train --model.size = ti", 4), ("train --config te", 3), ("evaluate te", 2)):
        script += f'COMP_WORDS=(cllm-gpu {words}); COMP_CWORD={size}; _cllm_gpu; echo "${{COMPREPLY[@]}};"\n'
    script += "complete -p cllm-gpu\n"
    done = subprocess.run([shell("bash"), "--norc"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["tiny;", ";", ";"]  # nothing of ours, so bash goes on to files:
    assert "-o default" in done.stdout


@pytest.mark.parametrize(("words", "offered"), CASES)
def test_fish(command: Command, workplace: Path, words: list[str], offered: set[str]) -> None:
    path = shell("fish")
    Path("script.fish").write_text(command("completion", "fish")[1], encoding="utf-8")
    asked = " ".join(["cllm-gpu", *words])
    done = subprocess.run(
        [path, "--no-config", "-c", f"source script.fish; complete -C {asked!r}"], capture_output=True, text=True
    )
    assert ({line.partition("\t")[0] for line in done.stdout.splitlines()}, done.stderr) == (offered, "")


def test_zsh(command: Command, workplace: Path) -> None:
    """It reads the script and registers the function; what Tab shows needs a terminal."""
    path = shell("zsh")
    Path("script.zsh").write_text(command("completion", "zsh")[1], encoding="utf-8")
    code = "autoload -U compinit; compinit -D -u; source script.zsh; print $_comps[cllm-gpu]"
    done = subprocess.run([path, "-f", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("_cllm_gpu\n", "")


def test_every_command_has_its_module() -> None:
    for name in COMMANDS:
        assert load_command(name).COMMAND.name == name
