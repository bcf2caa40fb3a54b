"""Copies of a launch's arrays with guard bytes around them, so that out-of-bounds accesses are detected.

A checked launch runs on these copies: each array is isolated, has the alignment a GPU would give it, and is copied back
afterwards. Arrays that overlap in memory (an in-place operation, interleaved strided views) share one copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

MARGIN = 8192
"""Guard bytes on each side of a copy."""
COPY_LIMIT = 256 << 20
"""Larger spans (views with strides of gigabytes) are not copied: accesses next to them may go undetected."""
ALIGNMENT = 512
"""Alignment of GPU allocations; a view keeps its offset within the allocation."""

Array = np.ndarray[Any, Any]


@dataclass
class Span:
    """The memory [low, high) of one or more overlapping arrays, and its copy."""

    low: int
    high: int
    name: str
    item_bytes: int
    writeable: bool
    offset: int
    """Offset of `low` from the start of the array that owns the memory."""

    def __post_init__(self) -> None:
        size = self.high - self.low
        self.address = self.low
        self._copied = size <= COPY_LIMIT
        if not self._copied:
            return
        self._buffer = np.zeros(size + 2 * MARGIN + 2 * ALIGNMENT, np.uint8)
        start = self._buffer.ctypes.data + MARGIN
        start += (self.offset - start) % ALIGNMENT
        skip = start - self._buffer.ctypes.data
        self.address = start
        self._copy = self._buffer[skip : skip + size]
        self._original = _memory(self.low, size)
        self._copy[...] = self._original

    def write_back(self) -> None:
        """Copy the kernel's results to the arrays."""
        if self.writeable and self._copied:
            self._original[...] = self._copy


def _memory(address: int, size: int) -> Array:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _bounds(array: Array) -> tuple[int, int]:
    if array.size == 0:
        return array.ctypes.data, array.ctypes.data
    return byte_bounds(array)


def _offset_in_base(array: Array, low: int) -> int:
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return low - owner.ctypes.data


def spans_of(arrays: Sequence[tuple[str, Array]]) -> list[Span]:
    """One span per group of overlapping arrays, sorted by address."""
    groups: list[list[tuple[int, int, str, Array]]] = []
    for low, high, name, array in sorted(
        ((*_bounds(array), name, array) for name, array in arrays), key=lambda item: item[:2]
    ):
        if groups and low < max(member[1] for member in groups[-1]):
            groups[-1].append((low, high, name, array))
        else:
            groups.append([(low, high, name, array)])
    return [_span(group) for group in groups]


def _span(group: list[tuple[int, int, str, Array]]) -> Span:
    low = group[0][0]
    return Span(
        low=low,
        high=max(member[1] for member in group),
        name=" and ".join(dict.fromkeys(member[2] for member in group)),
        item_bytes=min(member[3].dtype.itemsize for member in group),
        writeable=any(member[3].flags.writeable for member in group),
        offset=_offset_in_base(group[0][3], low),
    )


def address_in(spans: Sequence[Span], array: Array) -> int:
    """Address of the first element of `array` in the copies."""
    first, low = array.ctypes.data, _bounds(array)[0]
    for span in spans:
        if span.low <= low and (low < span.high or low == span.low == span.high):
            return span.address + first - span.low
    raise AssertionError("an array without a span")
