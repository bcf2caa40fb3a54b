"""Loads the CUDA sources with the project's headers inlined, and reads the kernels' parameters from them.

Headers are inlined so that a compiler cache keyed by a hash of the source text notices changes in them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from cllm_gpu.ops.cuda.params_struct import Field, ParamsStruct, parse_declaration, read_struct
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
class Signature:
    """What a kernel takes: its parameters, or the fields of the one struct that it takes by value."""

    fields: tuple[Field, ...]
    struct: ParamsStruct | None


@functools.cache
def kernel_parameters(source: str) -> dict[str, Signature]:
    """The signature of every entry point `ENTRY(name)(…)` of a source, in order."""
    text = _COMMENT.sub("", load_source(source))
    return {match[1]: _signature(text, match[2]) for match in _ENTRY.finditer(text)}


def _signature(text: str, parameters: str) -> Signature:
    fields = tuple(field for part in parameters.split(",") if part.strip() for field in parse_declaration(part))
    if len(fields) == 1 and (struct := read_struct(text, fields[0].type)) is not None:
        return Signature(struct.fields, struct)
    return Signature(fields, None)
