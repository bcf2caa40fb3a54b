"""Every Python snippet of docs/ that is shown with its output runs, in order, and prints what the page says."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest

from cllm_gpu.compiler import find_compiler

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"kernels.md": 7, "library.md": 8, "formats.md": 2}
"""Pages with snippets, and how many outputs each shows at least."""


@pytest.mark.parametrize("page", PAGES)
def test_the_page_does_what_it_says(page: str) -> None:
    if find_compiler() is None and os.environ.get("CLLM_REQUIRE_COMPILER") == "1":
        pytest.fail("CLLM_REQUIRE_COMPILER=1, and there is no C++ compiler")
    if find_compiler() is None:
        pytest.skip("not run: the simulator needs a C++ compiler (g++ or clang++)")
    blocks = re.findall(r"^```(python|text)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.S | re.M)
    assert [kind for kind, _ in blocks].count("text") >= PAGES[page]
    names: dict[str, Any] = {}
    printed = ""
    for number, (kind, text) in enumerate(blocks):
        if kind == "text":
            assert printed.strip() == text.strip(), f"after block {number - 1}"
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(text, f"docs/{page} block {number}", "exec"), names)
        printed = output.getvalue()
        follows = blocks[number + 1][0] if number + 1 < len(blocks) else "python"
        assert follows == "text" or not printed, f"block {number} prints what the page does not show"


def test_every_kind_of_finding_is_on_the_page() -> None:
    from cllm_gpu.simulator.errors import KINDS

    listed = re.findall(r"^\| `([a-z ]+)` \|", (DOCS / "kernels.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(KINDS)
