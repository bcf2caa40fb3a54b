"""Checks of array arguments for C++, and their addresses."""

from __future__ import annotations

from typing import Any

import numpy as np

INT32 = np.dtype(np.int32)


def address(name: str, x: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Address of the contiguous array `x`. Raises ValueError unless it has this shape and dtype."""
    if x.shape != shape or x.dtype != dtype or not x.flags.c_contiguous:
        _refuse(name, x, shape, dtype, "C-contiguous")
    return x.ctypes.data


def optional(name: str, x: Any | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int | None:
    """As `address`; None if `x` is None."""
    return None if x is None else address(name, x, shape, dtype)


def strided(name: str, x: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, tuple[int, ...]]:
    """Address of `x`, and strides in elements of all axes but the last, which must be contiguous."""
    size = dtype.itemsize
    if x.shape != shape or x.dtype != dtype or (x.strides[-1] != size and shape[-1] > 1) or not x.flags.aligned:
        _refuse(name, x, shape, dtype, "contiguous along the last axis")
    return x.ctypes.data, tuple(stride // size for stride in x.strides[:-1])


def _refuse(name: str, x: Any, shape: tuple[int, ...], dtype: np.dtype[Any], layout: str) -> None:
    raise ValueError(f"{name} is {x.dtype} {x.shape} with strides {x.strides}; expected {dtype} {shape}, {layout}")
