"""Every snippet of docs/kernels.md runs, in order, and prints what the page says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_the_page_does_what_it_says() -> None:
    blocks = re.findall(r"^```(python|text)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    assert [kind for kind, _ in blocks].count("text") >= 7
    names: dict[str, Any] = {}
    printed = ""
    for number, (kind, text) in enumerate(blocks):
        if kind == "text":
            assert printed.strip() == text.strip(), f"after block {number - 1}"
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(text, f"docs/kernels.md block {number}", "exec"), names)
        printed = output.getvalue()
        follows = blocks[number + 1][0] if number + 1 < len(blocks) else "python"
        assert follows == "text" or not printed, f"block {number} prints what the page does not show"


def test_every_kind_of_finding_is_on_the_page() -> None:
    from cllm_gpu.simulator.errors import KINDS

    listed = re.findall(r"^\| `([a-z ]+)` \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(KINDS)
