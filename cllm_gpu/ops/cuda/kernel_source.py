"""Loads the CUDA sources with the project's headers inlined, and reads the kernels' parameters from them.

Headers are inlined so that a compiler cache keyed by a hash of the source text notices changes in them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from cllm_gpu.utils.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[2]
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"[ \t]*$', re.MULTILINE)
_PRAGMA_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once[ \t]*$", re.MULTILINE)
_ENTRY = re.compile(r"\bENTRY\((\w+)\)\s*\(([^)]*)\)")
_COMMENT = re.compile(r"//[^\n]*")


def source_directory() -> Path:
    """The folder of the .cu files, in an installed wheel or in the checkout. Raises UserError if there is neither."""
    for folder in (_PACKAGE / "cuda_sources", _PACKAGE.parent / "cuda"):
        if (folder / "common.cuh").is_file():
            return folder
    raise UserError("the CUDA sources are missing from this installation; install the cllm-gpu wheel again")


@functools.cache
def load_source(name: str) -> str:
    """Text of `name` (for example "adam.cu") with each of the project's headers inlined at its first include."""
    folder = source_directory()
    seen: set[str] = set()

    def splice(file: str) -> str:
        def include(match: re.Match[str]) -> str:
            header = match[1]
            if header in seen:
                return ""
            seen.add(header)
            line = match.string.count("\n", 0, match.start()) + 1
            return f'{splice(header)}#line {line + 1} "{file}"'

        text = _PRAGMA_ONCE.sub("", (folder / file).read_text(encoding="utf-8"))
        return f'#line 1 "{file}"\n{_INCLUDE.sub(include, text)}\n'

    return splice(name)


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter as declared in the source."""

    name: str
    type: str
    """The C type without const and "*": "real", "float", "int", "long long" …"""
    pointer: bool
    constant: bool
    """Whether it is a pointer to const."""


@functools.cache
def kernel_parameters(source: str) -> dict[str, tuple[Parameter, ...]]:
    """The entry points `ENTRY(name)(…)` of a source and their parameters, in order."""
    text = _COMMENT.sub("", (source_directory() / source).read_text(encoding="utf-8"))
    return {
        match[1]: tuple(_parameter(part) for part in match[2].split(",") if part.strip())
        for match in _ENTRY.finditer(text)
    }


def _parameter(declaration: str) -> Parameter:
    words = declaration.replace("*", " * ").split()
    constant = "const" in words
    pointer = "*" in words
    kept = [word for word in words if word not in ("const", "*", "__restrict__")]
    return Parameter(kept[-1], " ".join(kept[:-1]), pointer, constant)
