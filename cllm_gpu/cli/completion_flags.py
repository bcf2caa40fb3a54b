"""The flags of a command as plain data, derived from its options dataclass by tyro's rules; for completion.

tyro's own completion starts Python at every press of Tab and offers no files for positional arguments.
tests/cli/test_completion.py compares these flags with those in tyro's help.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from cllm_gpu.backend import NAMES


@dataclass(frozen=True)
class Flag:
    """An option and its possible values, or a positional argument."""

    names: tuple[str, ...]
    """As typed: ("--model.bias", "--model.no-bias"); empty for a positional argument."""
    description: str
    """The first sentence of its docstring."""
    choices: tuple[str, ...] = ()
    """The possible values; empty if any value is accepted."""
    takes_value: bool = True
    takes_file: bool = False
    """The value may be the path of a file or folder."""


HELP = Flag(("-h", "--help"), "The options, and examples", takes_value=False)


def command_flags(options: type[Any]) -> list[Flag]:
    """All flags and positional arguments of the command with this options dataclass."""
    return [HELP, *_flags(options, "")]


def _flags(options: type[Any], prefix: str) -> Iterator[Flag]:
    described = _descriptions(options)
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        hint, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        name = field.name.replace("_", "-")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _flags(hint, prefix if unnamed else f"{prefix}{name}.")
        else:
            yield _flag(prefix, name, hint, marks, described.get(field.name, ""))


def _flag(prefix: str, name: str, hint: Any, marks: list[Any], description: str) -> Flag:
    aliases = (alias for mark in marks for alias in getattr(mark, "aliases", None) or ())
    names = () if tyro.conf.Positional in marks else (*aliases, f"--{prefix}{name}")
    if hint is bool:
        paired = tyro.conf.FlagCreatePairsOff not in marks
        return Flag((*names, f"--{prefix}no-{name}") if paired else names, description, takes_value=False)
    kinds = NAMES if name == "backend" else list(_leaves(hint))  # a str, validated in get_backend
    choices = () if int in kinds else tuple(kind for kind in kinds if isinstance(kind, str))
    return Flag(names, description, choices, takes_file=not choices and (Path in kinds or str in kinds))


def _leaves(hint: Any) -> Iterator[Any]:
    """The types and literal values in an annotation: `tuple[Literal["a"], ...] | None` → "a", …, NoneType."""
    inner = get_args(hint)
    if get_origin(hint) is Literal or not inner:
        yield from inner or (hint,)
    else:
        for part in inner:
            yield from _leaves(part)


def _descriptions(options: type[Any]) -> dict[str, str]:
    """Field → the first sentence of the docstring below it, including fields of base classes."""
    found: dict[str, str] = {}
    for kind in reversed(options.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                words = " ".join(str(below.value.value).split())
                found[field.target.id] = words.partition(". ")[0].rstrip(".")
    return found
