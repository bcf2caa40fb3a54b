"""JSON that gives back exactly what went in: every finite float to the bit, and infinities and NaN.

Standard JSON has no infinities; they are written as {"$float": "inf"}. Any JSON reader can read the result.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

_TAG = "$float"


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Text of plain data: dict with string keys, list, tuple (read back as a list), str, int, float, bool, None.

    NumPy numbers become Python's. Raises TypeError for anything else, ValueError for a dict with the key "$float".
    """
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(_encode(value), indent=indent, separators=separators, allow_nan=False, ensure_ascii=False)


def loads(text: str | bytes) -> Any:
    """The plain data of `dumps`. Raises ValueError when it is not JSON."""
    try:
        return json.loads(text, object_hook=_decode)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: repr(float(value))}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"JSON keys must be strings, not {key!r}")
            if key == _TAG:
                raise ValueError(f"the key {_TAG!r} marks floats that JSON cannot write")
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value


def _decode(value: dict[str, Any]) -> Any:
    if value.keys() != {_TAG}:
        return value
    if value[_TAG] not in ("inf", "-inf", "nan"):
        raise ValueError(f"{value[_TAG]!r} is no float that JSON cannot write")
    return float(value[_TAG])
