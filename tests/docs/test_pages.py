"""What docs/ shows is what happens: snippets and commands run, in order, and print what the page says after them.

A page's Python prints exactly what the text below it says. Of its commands, which run in a folder with a copy of docs/
and the README, the text shows what they print but for the numbers; `…` stands for anything, alone in a line for lines.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from cllm_gpu.cli import run
from cllm_gpu.utils.compiler import find_compiler

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {"kernels.md": 7, "library.md": 8, "formats.md": 2, "training.md": 4}
"""Pages with snippets, and how many outputs each shows at least."""
NUMBER = re.compile(r"[-+]?\d[\d,.:]*(?:e[-+]?\d+)?")


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page == "training.md" else ()) for page in PAGES]
)
def test_the_page_does_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_compiler() is None and os.environ.get("CLLM_REQUIRE_COMPILER") == "1":
        pytest.fail("CLLM_REQUIRE_COMPILER=1, and there is no C++ compiler")
    if find_compiler() is None:
        pytest.skip("not run: the simulator needs a C++ compiler (g++ or clang++)")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(python|sh|text)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.S | re.M)
    assert [kind for kind, _ in blocks].count("text") >= PAGES[page]
    names: dict[str, Any] = {}
    before, printed = "", ""
    for number, (kind, text) in enumerate(blocks):
        follows = blocks[number + 1][0] if number + 1 < len(blocks) else ""
        if kind == "text" and before == "sh":
            assert re.fullmatch(pattern(text), masked(printed)), f"{printed}\nis not\n{text}"
        elif kind == "text":
            assert printed.strip() == text.strip(), f"after block {number - 1}"
        elif kind == "sh":
            printed = shell(text, monkeypatch)
        else:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(text, f"docs/{page} block {number}", "exec"), names)
            printed = output.getvalue()
            assert follows == "text" or not printed, f"block {number} prints what the page does not show"
        before = kind


def shell(text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the commands of a block print; one that fails must be the last, and its line an error of one line."""
    monkeypatch.setenv("CLLM_BACKEND", "numpy")
    monkeypatch.setenv("CLLM_CACHE_DIR", os.path.abspath("cache"))
    printed, status = io.StringIO(), 0
    for line in text.replace("\\\n", "").splitlines():
        assert status == 0, printed.getvalue()
        program, *arguments = shlex.split(line)
        assert program == "cllm-gpu"
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = run(arguments)
    assert (status == 2) == ("cllm-gpu: error: " in printed.getvalue()), printed.getvalue()
    return printed.getvalue()


def masked(text: str) -> str:
    """The text without its numbers, trailing blanks and the empty lines at its ends."""
    return NUMBER.sub("#", "\n".join(line.rstrip() for line in text.strip("\n").splitlines()))


def pattern(shown: str) -> str:
    """A regular expression for what a page shows of an output."""
    lines = re.escape(masked(shown)).replace(re.escape("…") + "\\\n", "(?:.*\\n)*?").replace("…", ".*?")
    return re.sub(r"\\\n\.\*\?$", r"(?:\\n.*)*", lines)


def test_every_kind_of_finding_is_on_the_page() -> None:
    from cllm_gpu.simulator.errors import KINDS

    listed = re.findall(r"^\| `([a-z ]+)` \|", (DOCS / "kernels.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(KINDS)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1.5\n", "a 2,000\n", True),
        ("a 1.5\n", "b 1.5\n", False),
        ("…\nb\n", "b\n", True),
        ("…\nb\n", "x\ny\nb\n", True),
        ("…\nb\n", "b\nx\n", False),
        ("a\n…\n", "a\nx\ny\n", True),
        ("a\n…\n", "a\n", True),
        ("a\n…\nb\n", "a\nx\ny\n", False),
        ("a … c\n", "a bb c\n", True),
        ("a … c\n", "a bb d\n", False),
    ],
)
def test_what_stands_for_lines_left_out(shown: str, printed: str, same: bool) -> None:
    assert bool(re.fullmatch(pattern(shown), masked(printed))) == same
