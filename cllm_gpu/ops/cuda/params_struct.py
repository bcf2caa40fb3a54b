"""Structs that kernels take by value: their fields, read from the CUDA source, and where each lies in memory.

A struct holds pointers, numbers of the types in _CODES, and such structs; it may be a template of one type. Every field
lies at a multiple of its size, as CUDA's and the host's compilers have it: the tests ask both.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_CODES = {"int": "i", "unsigned": "I", "long long": "q", "unsigned long long": "Q", "float": "f", "double": "d"}
"""C type → its letter in a format of the module `struct`."""
_POINTER = "P"
_DECLARATION = re.compile(r"^(.*?[\w>])\s*(\*?)\s*(\w+)$", re.S)
_QUALIFIER = re.compile(r"\b(?:__restrict__|__grid_constant__)\b")


@dataclass(frozen=True)
class Field:
    """A number or an array that a kernel takes, as its source declares it: a parameter, or a field of its struct."""

    name: str
    """Of a field of a nested struct its path, such as "sizes.heads"; an array `x.data` is called "x"."""
    type: str
    """The C type without const and without the star: "real", "float", "int", "long long" …"""
    pointer: bool
    constant: bool
    """The kernel only reads what it points to."""


@dataclass(frozen=True)
class ParamsStruct:
    """A struct that is a kernel's only parameter, with its nested structs' fields in place of them."""

    name: str
    fields: tuple[Field, ...]
    paths: tuple[str, ...]
    """Of each field in C++."""
    offsets: tuple[int, ...]
    """Of each field in bytes."""
    format: str
    """Of the module `struct`, native sizes and alignment: what packs the fields in order."""

    @property
    def size(self) -> int:
        """In bytes."""
        return struct.calcsize(self.format)


def parse_declaration(text: str) -> list[Field]:
    """The fields of one C++ declaration, such as `const float *lse, *delta`."""
    first, *others = _QUALIFIER.sub("", text).split(",")
    match = _DECLARATION.match(first.strip())
    if match is None:
        raise ValueError(f"cannot read the declaration {text.strip()!r} of a CUDA source")
    words = match[1].split()
    kind = " ".join(word for word in words if word != "const")
    declarators = [match[2] + match[3], *(other.strip() for other in others)]
    return [Field(name.lstrip("* "), kind, name.startswith("*"), "const" in words) for name in declarators]


def read_struct(text: str, name: str) -> ParamsStruct | None:
    """The struct `name` of a source without comments; None if it defines no such struct."""
    if _body(text, name) is None:
        return None
    fields, paths, offsets, layout = [], [], [], "@"
    for code, path, field in _members(text, name, ""):
        layout += code
        if field is not None:
            fields.append(field)
            paths.append(path)
            offsets.append(struct.calcsize(layout) - struct.calcsize(code))
    return ParamsStruct(name, tuple(fields), tuple(paths), tuple(offsets), layout)


def _members(text: str, name: str, prefix: str) -> list[tuple[str, str, Field | None]]:
    """(format, path, field) of a struct's members, nested ones unfolded; without a field, an alignment."""
    found: list[tuple[str, str, Field | None]] = []
    for declared in _fields(text, name):
        path = prefix + declared.name
        if not declared.pointer and declared.type not in _CODES:
            found += _members(text, declared.type, f"{path}.")
            continue
        code = _POINTER if declared.pointer else _CODES[declared.type]
        shown = Field(path.removesuffix(".data"), declared.type, declared.pointer, declared.constant)
        found.append((code, path, shown))
    widest = max((code.lstrip("0") for code, _, _ in found), key=struct.calcsize)
    alignment = (f"0{widest}", "", None)  # before the first and after the last
    return [alignment, *found, alignment]


def _fields(text: str, name: str) -> list[Field]:
    body = _body(text, name)
    if body is None:
        raise ValueError(f"a kernel's parameters hold a {name}, which is no struct of its source")
    return [field for part in body.split(";") if part.strip() and "(" not in part for field in parse_declaration(part)]


def _body(text: str, name: str) -> str | None:
    """What stands between the braces of a struct, its functions' bodies left out; None if there is no such struct."""
    plain, _, argument = name.partition("<")
    template = r"template <class (\w+)>\s*" if argument else "()"
    match = re.search(rf"{template}struct {plain} {{(.*?)\n}};", text, re.S)
    if match is None:
        return None
    body = match[2]
    while (shorter := re.sub(r"{[^{}]*}", ";", body)) != body:
        body = shorter
    return re.sub(rf"\b{match[1]}\b", argument.rstrip("> "), body) if argument else body
