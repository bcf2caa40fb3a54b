"""Lines of the C++ and CUDA sources are no longer than those of the Python files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("cuda", "cllm_gpu/ops/native/csrc", "cllm_gpu/simulator/include", "cllm_gpu/simulator/runtime")
SUFFIXES = (".cu", ".cuh", ".cpp", ".hpp", ".h")


def test_no_line_is_too_long() -> None:
    found = re.search(r"^line-length = (\d+)$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    sources = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*")) if p.suffix in SUFFIXES]
    assert {path.suffix for path in sources} == set(SUFFIXES)
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > int(found[1])
    ]
    assert not long
