"""Maps an address in compiled code to its line of CUDA source, with the platform's symbolizer."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """A source line. file: empty for the CUDA source itself, else the name of a header."""

    line: int
    file: str = ""

    @property
    def is_kernel_source(self) -> bool:
        """Whether the line is in a CUDA source rather than a header."""
        return not self.file or self.file.endswith(".cu")

    def __str__(self) -> str:
        return f"line {self.line} of {self.file}" if self.file else f"line {self.line}"


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def offset_in_library(address: int) -> int:
    """`address` relative to the load address of its library; unchanged if the platform cannot determine it."""
    info = _DlInfo()
    try:
        found = ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(info))
    except (AttributeError, OSError):
        return address
    return address - (info.base or 0) if found else address


@functools.lru_cache(maxsize=4096)
def places(library: Path, address: int) -> tuple[Place, ...]:
    """The source lines of a return address, innermost inlined function first; empty if unknown."""
    offset = offset_in_library(address) - 1  # the call precedes its return address
    for tool in ("addr2line", "llvm-symbolizer"):
        if path := shutil.which(tool):
            listed = ["-e", str(library), "-i", hex(offset)] if tool == "addr2line" else []
            command = [path, *(listed or [f"--obj={library}", "--inlines", "--functions=none", hex(offset)])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return tuple(_parse(done.stdout))
    return ()


def _parse(text: str) -> list[Place]:
    matches = re.finditer(r"^(.*?):(\d+)(?::\d+)?(?: \(.*\))?$", text, re.M)
    found = [place(match[1], int(match[2])) for match in matches if int(match[2])]
    return [p for p in found if not p.file.startswith("<simulator>")] or found


def place(file: str, line: int) -> Place:
    """A source line with the file name to show: empty for the kernel's own source, the name of a header otherwise."""
    path = Path(file)
    if re.fullmatch(r"[0-9a-f]{32}\.cu", path.name):
        return Place(line)
    inside = "simulator" in path.parts and path.suffix == ".hpp"
    return Place(line, f"<simulator>/{path.name}" if inside else path.name)
