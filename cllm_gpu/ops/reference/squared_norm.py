"""Σ x² in float64, in a fixed order."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.reference.tiling import row_tiles
from cllm_gpu.ops.specification import operation


@operation(flat=True)
def squared_norm(xp: Any, x: Any) -> float:
    """Sum of squares of x (n,) in float64; inf or NaN if an element is not finite. Deterministic."""
    total = 0.0
    for part in row_tiles(xp, x.size, 1):
        tile = x[part].astype(xp.float64)
        tile *= tile
        total += float(tile.sum())
    return total
