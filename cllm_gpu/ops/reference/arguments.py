"""Checks of what the reference is given: the strictest of all sides, so that a mistake is found on any machine."""

from __future__ import annotations

from typing import Any


def require_ids(xp: Any, name: str, ids: Any, count: int, *, ignored: int | None = None) -> None:
    """`ids` must be int32, each 0 … count − 1 or `ignored`. TypeError or IndexError naming the argument.

    On a device the values are not looked at: that would wait for it.
    """
    if ids.dtype != xp.int32:
        raise TypeError(f"{name} is of dtype {ids.dtype}; it must be int32")
    if xp.__name__ != "numpy" or ids.size == 0:
        return
    allowed = (ids >= 0) & (ids < count)
    if ignored is not None:
        allowed |= ids == ignored
    if not allowed.all():
        raise IndexError(f"{name} holds {int(ids[~allowed][0])}; it must lie between 0 and {count - 1}")


def require_dtype(dtype: Any, **arrays: Any) -> None:
    """Every array that is not None must be of `dtype`. TypeError naming the first argument that is not."""
    for name, array in arrays.items():
        if array is not None and array.dtype != dtype:
            raise TypeError(f"{name} is of dtype {array.dtype}; the other arrays are {dtype}")


def require_shape(name: str, array: Any | None, shape: tuple[int, ...]) -> None:
    """`array`, unless None, must have this shape. ValueError naming the argument."""
    if array is not None and array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")
