"""docs/extending.md is followed: its files and changes go into a copy of the repository, where its commands run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_pages import masked, pattern

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"^```(python|diff|sh|text)\n(.*?)^```$", re.S | re.M)
CHECKED = (
    "tests/ops/test_registry.py",
    "tests/ops/reference/test_rms_norm.py",
    "tests/ops/reference/test_bfloat16.py",
    "tests/training/test_own_update_rule.py::test_the_configuration_names_every_rule",
)
"""Tests that run in the copy, the page's own among them."""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with every file and every change of the page."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("cllm_gpu", "cuda", "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        path, _, rest = text.partition("\n")
        if kind == "python":
            new = copy / path.removeprefix("# ")
            assert not new.exists(), path
            new.parent.mkdir(exist_ok=True)
            new.write_text(rest, encoding="utf-8")
        elif kind == "diff":
            changed = copy / path
            changed.write_text(apply(rest, changed.read_text(encoding="utf-8")), encoding="utf-8")
    return copy


def apply(changes: str, text: str) -> str:
    """`text` with the changes applied, parts between @@ in order; what a part replaces must occur exactly once."""
    for part in changes.split("@@\n"):
        lines = [(line[:1], line[1:] + "\n") for line in part.splitlines()]
        before = "".join(line for kind, line in lines if kind != "+")
        after = "".join(line for kind, line in lines if kind != "-")
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def in_copy(copy: Path, *arguments: str) -> str:
    """What Python prints with the arguments, in the copy and with its package."""
    environment = os.environ | {"PYTHONPATH": str(copy), "CLLM_BACKEND": "numpy", "CLLM_CACHE_DIR": str(copy / "cache")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_commands_print_what_the_page_says(followed: Path) -> None:
    printed, ran = "", 0
    for kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "sh":
            lines = [shlex.split(line) for line in text.replace("\\\n", "").splitlines()]
            assert all(program == "cllm-gpu" for program, *_ in lines)
            commands = [arguments for _, *arguments in lines]
            printed = in_copy(followed, "-c", f"from cllm_gpu.cli import run; exit(any(map(run, {commands})))")
            ran += len(commands)
        elif kind == "text":
            assert re.fullmatch(pattern(text), masked(printed)), f"{printed}\nis not\n{text}"
    assert ran >= 10


@pytest.mark.slow
def test_the_tests_that_run_by_themselves_pass(followed: Path) -> None:
    assert " passed" in in_copy(followed, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKED)


def test_what_needs_no_command_is_said_of_files_that_exist() -> None:
    """Every path on the page is there, or one that the page makes."""
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:cllm_gpu|cuda|tests|bench)/[\w/]+\.\w+)`", text))
    missing = {path for path in named if not (ROOT / path).exists()}
    assert all("rms_norm" in path or Path(path).stem == "m" for path in missing)
    assert len(named) > 15


def test_a_change_whose_place_is_gone_is_found() -> None:
    assert apply(" a\n+b\n@@\n-c\n+d\n", "a\nc\n") == "a\nb\nd\n"
    with pytest.raises(AssertionError, match="a"):
        apply(" a\n+b\n", "c\n")
    with pytest.raises(AssertionError, match="a"):
        apply(" a\n+b\n", "a\na\n")
