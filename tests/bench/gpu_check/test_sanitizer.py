"""Finding compute-sanitizer, its command line, and reading what it says."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bench.gpu_check import sanitizer
from bench.gpu_check.sanitizer import FOUND_EXIT, TOOLS, Sanitizer, find_sanitizer, read_verdict

CLEAN = {
    "memcheck": "========= COMPUTE-SANITIZER\n24 kernels\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}
CLEAN["initcheck"] = CLEAN["synccheck"] = CLEAN["memcheck"]
FOUND = {
    "memcheck": """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at gelu_forward_float32+0x90
=========     by thread (32,0,0) in block (0,0,0)
========= ERROR SUMMARY: 3 errors
""",
    "racecheck": """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at sum_finish_float32+0x1f0
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
""",
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_clean_run_passes(tool: str) -> None:
    assert read_verdict(tool, 0, CLEAN[tool]).passed


@pytest.mark.parametrize(("tool", "count"), [("memcheck", 3), ("racecheck", 1)])
def test_findings_fail_and_name_the_first(tool: str, count: int) -> None:
    verdict = read_verdict(tool, FOUND_EXIT, FOUND[tool])
    assert not verdict.passed
    assert verdict.detail.startswith(f"{count} findings: ")
    assert "Invalid __global__ write" in verdict.detail or "Race reported" in verdict.detail


@pytest.mark.parametrize(
    ("status", "output"),
    [
        (0, ""),
        (255, "========= COMPUTE-SANITIZER\n========= Error: Target application terminated before first API call\n"),
        (1, CLEAN["memcheck"]),
        (FOUND_EXIT, CLEAN["memcheck"]),
        (0, CLEAN["memcheck"] + FOUND["memcheck"]),
    ],
)
def test_anything_but_a_clean_summary_fails(status: int, output: str) -> None:
    assert not read_verdict("memcheck", status, output).passed


def test_the_summary_of_another_tool_does_not_count() -> None:
    assert not read_verdict("racecheck", 0, CLEAN["memcheck"]).passed


def test_the_command_line(tmp_path: Path) -> None:
    command = Sanitizer(tmp_path / "cs", tmp_path / "lib").command("memcheck", ["python", "-m", "x"])
    assert command[:3] == [str(tmp_path / "cs"), "--tool", "memcheck"]
    assert command[-3:] == ["python", "-m", "x"]
    assert command[command.index("--error-exitcode") + 1] == str(FOUND_EXIT)
    assert command[command.index("--injection-path") + 1] == str(tmp_path / "lib")
    assert "--padding" in command
    assert "--padding" not in Sanitizer(tmp_path / "cs").command("racecheck", [])


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for the tool")
def test_it_is_found_on_the_path_and_in_a_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "compute-sanitizer"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    monkeypatch.setattr(sanitizer, "_from_wheel", lambda: None)
    monkeypatch.setattr(sanitizer, "_folders", lambda: iter([tmp_path]))
    monkeypatch.setenv("PATH", os.devnull)
    assert find_sanitizer() is None, "a file that cannot be run is not the tool"
    program.chmod(0o755)
    assert find_sanitizer() == Sanitizer(program)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sanitizer, "_folders", lambda: iter([]))
    assert find_sanitizer() == Sanitizer(program)


def test_our_kernels_names_match_the_filter() -> None:
    import re

    from bench.gpu_check.launch_all import all_kernels

    pattern = re.compile(sanitizer.OUR_KERNELS.removeprefix("regex="))
    assert all_kernels()
    for _, kernel in all_kernels():
        assert pattern.search(f"{kernel}_float32")
        assert pattern.search(f"{kernel}_bfloat16")
    assert not pattern.search("ampere_sgemm_32x32_sliced1x4_tn")
