"""Arrays planned before they are made: names, shapes and dtypes first, then one allocation with a view for each.

Every view starts at a multiple of 128 bytes (a GPU's cache line, twice a CPU's), so vector loads are aligned and
results do not depend on where the allocator put things.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

ALIGNMENT = 128


def aligned(size: int) -> int:
    """`size` in bytes rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Plan:
    """What a set of buffers will hold: an ordered table of name → (shape, dtype), and its size in bytes."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tuple[int, ...], np.dtype[Any], int]] = {}
        self.bytes = 0

    def add(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Append an array; names are unique."""
        if name in self._entries:
            raise ValueError(f"buffer {name} is planned twice")
        kind = np.dtype(dtype)
        self._entries[name] = (shape, kind, self.bytes)
        self.bytes += aligned(math.prod(shape) * kind.itemsize)

    def __iter__(self) -> Iterator[tuple[str, tuple[int, ...], np.dtype[Any], int]]:
        for name, (shape, dtype, offset) in self._entries.items():
            yield name, shape, dtype, offset

    def allocate(self, empty_bytes: Any) -> dict[str, Any]:
        """Views by name into one array of `empty_bytes(n)`: aligned, uninitialised memory of uint8."""
        memory = empty_bytes(self.bytes)
        views = {}
        for name, shape, dtype, offset in self:
            size = math.prod(shape) * dtype.itemsize
            views[name] = memory[offset : offset + size].view(dtype).reshape(shape)
        return views
