"""A dataclass from plain data, as TOML and JSON give it: every value of the annotated type, every name a known one."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, get_args, get_type_hints

from cllm_gpu.utils.errors import UserError


def dataclass_from_dict(under: Any, values: dict[str, Any], prefix: str) -> Any:
    """The dataclass `under` with `values` over its own, sections within it included.

    UserError naming the key, `prefix` before it.
    """
    hints = get_type_hints(type(under))
    names = {f.name for f in dataclasses.fields(under)}
    arguments = {}
    for name, value in values.items():
        if name not in names:
            raise UserError(f"unknown key {prefix}{name}{did_you_mean(name, names)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{name} is a section; write it as [{prefix}{name}]")
            arguments[name] = dataclass_from_dict(getattr(under, name), value, f"{prefix}{name}.")
        else:
            arguments[name] = _convert(value, hint, f"{prefix}{name}")
    return dataclasses.replace(under, **arguments)


def did_you_mean(name: str, known: Any) -> str:
    """ "; did you mean …?" for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(sorted(known))}"


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type; UserError when it is of another kind."""
    if value is None and type(None) in get_args(hint):
        return None
    alternatives = [option for option in (get_args(hint) or (hint,)) if option is not type(None)]
    options = [choice for option in alternatives for choice in (get_args(option) or (option,))]
    words = [option for option in options if isinstance(option, str)]  # of a Literal
    kinds = [option for option in options if not isinstance(option, str)]
    if isinstance(value, str) and value in words:
        return value
    if not kinds:
        raise UserError(f"{where} is {value!r}; choose one of {', '.join(words)}")
    kind = kinds[0]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        raise UserError(f"{where} is {value!r}; it must be {' or '.join([f'of type {kind.__name__}', *words])}")
    return value
