"""Checks of an operation's arrays before a kernel is launched: shapes, dtypes, strides, alignment."""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm_gpu.ops.cuda.variant import DTYPES
from cllm_gpu.utils.errors import UserError

_STORAGE = {DTYPES[name]: name for name in ("float32", "bfloat16")}


def storage_of(operation: str, name: str, array: Any) -> str:
    """dtype name of an array of activations or weights: "float32" or "bfloat16"; UserError for another."""
    kind = _STORAGE.get(array.dtype)
    if kind is None:
        raise UserError(f"{operation}: argument {name} has dtype {array.dtype.name}; it must be float32 or bfloat16")
    return kind


class Shapes:
    """Checks the shapes of one call: a letter means the same number everywhere in it.

    >>> check = Shapes("linear_forward")
    >>> rows, columns = check("x", x, "N K")
    """

    def __init__(self, operation: str, **sizes: int) -> None:
        self.operation = operation
        self._sizes = dict(sizes)

    def __call__(self, name: str, array: Any, letters: str) -> tuple[int, ...]:
        """Shape of `array`; UserError when it disagrees with the letters bound so far. None is let through."""
        wanted = letters.split()
        if array is None:
            return ()
        shape = tuple(array.shape)
        if len(shape) != len(wanted):
            raise UserError(f"{self.operation}: argument {name} has shape {shape}; it must have {len(wanted)} axes")
        for letter, size in zip(wanted, shape, strict=True):
            if self._sizes.setdefault(letter, size) != size:
                expected = tuple(self._sizes.get(w, w) for w in wanted)
                raise UserError(f"{self.operation}: argument {name} has shape {shape}; it must be {expected}")
        return shape


def blocks_for(elements: int, per_block: int) -> int:
    """Blocks that cover `elements`."""
    return -(-elements // per_block)


def is_wide(columns: int, *arrays: Any) -> bool:
    """Rows of `columns` elements can be read 16 bytes at a time in every one of the arrays (None is left out)."""
    present = [array for array in arrays if array is not None]
    width = 16 // present[0].dtype.itemsize
    return columns % width == 0 and all(address_of(array) % 16 == 0 for array in present)


def address_of(array: Any) -> int:
    """Address of an array's first element, on the host or on a GPU."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def element_strides(operation: str, name: str, array: Any) -> tuple[int, ...]:
    """Strides in elements of all axes but the last, which must be contiguous; UserError otherwise.

    The stride of an axis of one element, or of an empty array, is never used, so whatever it is, it is let through.
    """
    size = array.dtype.itemsize
    if array.size and array.shape[-1] > 1 and array.strides[-1] != size:
        raise UserError(f"{operation}: argument {name} has strides {array.strides}; its last axis must be contiguous")
    if any(stride % size for stride in array.strides[:-1]):
        raise UserError(f"{operation}: argument {name} has strides {array.strides}, not whole elements")
    return tuple(stride // size for stride in array.strides[:-1])
