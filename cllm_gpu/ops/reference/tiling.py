"""Tiling of passes over rows, so that temporaries fit a CPU's cache (or are bounded on a GPU)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

CPU_TILE_ELEMENTS = 1 << 15  # 128 KB of float32: a few temporaries fit a 1–2 MB second-level cache
GPU_TILE_ELEMENTS = 1 << 25  # on a GPU only the memory of the temporaries is a concern


def tile_elements(xp: Any) -> int:
    """Elements of a temporary in a tiled pass with this array module."""
    return CPU_TILE_ELEMENTS if xp.__name__ == "numpy" else GPU_TILE_ELEMENTS


def row_tiles(xp: Any, rows: int, row_elements: int, *, tiles: int = 1, first: int = 0) -> Iterator[slice]:
    """Slices that cover rows `first` … `rows - 1` of `row_elements` elements each, `tiles` tiles at a time."""
    step = max(1, tiles * tile_elements(xp) // max(1, row_elements))
    for start in range(first, rows, step):
        yield slice(start, min(start + step, rows))
