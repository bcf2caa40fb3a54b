"""compute-sanitizer: finds the tool, builds its command line, and reads its output."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND_EXIT = 86
"""Exit status of compute-sanitizer if it finds an error, set by an option."""
OUR_KERNELS = r"regex=_(float32|bfloat16)$"
"""Matches the names of our entry points; kernels of libraries are not checked."""
INSTALL = (
    "compute-sanitizer is not installed: it is part of the CUDA toolkit (set CUDA_HOME to the toolkit's folder) and of "
    "the wheel nvidia-cuda-sanitizer-api-cu12"
)
_SUMMARIES = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "initcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "synccheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
}
_DETAIL = re.compile(r"^=========\s+(?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY)(\S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Sanitizer:
    """The program, and the folder of its libraries (None if it finds them itself)."""

    program: Path
    libraries: Path | None = None

    def command(self, tool: str, program: list[str]) -> list[str]:
        """The command line that runs `program` under `tool`."""
        options = ["--tool", tool, "--error-exitcode", str(FOUND_EXIT), "--kernel-name", OUR_KERNELS]
        if tool == "memcheck":
            options += ["--padding", "64", "--report-api-errors", "no"]
        if tool == "initcheck":
            options += ["--check-api-memory-access", "no"]  # arrays are copied although only partly written
        if self.libraries is not None:
            options += ["--injection-path", str(self.libraries)]
        return [str(self.program), *options, *program]


def _folders() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parent.parent
    if sys.platform != "win32":
        yield Path("/usr/local/cuda")
        yield from sorted(Path("/usr/local").glob("cuda-*"), reverse=True)


def find_sanitizer() -> Sanitizer | None:
    """Find the tool on the PATH, in a CUDA toolkit, or in NVIDIA's wheel. None if it is not found."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return Sanitizer(Path(found))
    for folder in _folders():
        for program in (folder / "bin" / "compute-sanitizer", folder / "compute-sanitizer" / "compute-sanitizer"):
            if os.access(program, os.X_OK):
                return Sanitizer(program)
    return _from_wheel()


def _from_wheel() -> Sanitizer | None:
    """The program in NVIDIA's wheel, which is installed without execute permission; sets it if possible."""
    package = importlib.util.find_spec("nvidia")
    for place in (package.submodule_search_locations or []) if package else []:
        folder = Path(place) / "cuda_sanitizer_api"
        program = folder / "bin" / "compute-sanitizer"
        if not program.is_file():
            continue
        try:
            program.chmod(program.stat().st_mode | 0o111)
        except OSError:
            continue
        return Sanitizer(program, folder / "lib")
    return None


@dataclass(frozen=True)
class Verdict:
    """The result of one tool."""

    passed: bool
    detail: str


def read_verdict(tool: str, status: int, output: str) -> Verdict:
    """Passed only if the tool printed a summary without findings and the exit status is 0."""
    found = _SUMMARIES[tool].findall(output)
    first = _DETAIL.search(output)
    said = f": {first[1][:160]}" if first else ""
    if not found:
        return Verdict(False, f"no summary, exit status {status}{said}")
    count = sum(int(number) for number in found)
    if count:
        return Verdict(False, f"{count} findings{said}")
    if status:
        return Verdict(False, f"nothing found, but exit status {status}{said}")
    return Verdict(True, "nothing found")
