"""Which numbers a checkpoint may hold: finite ones, and second moments that have a root.

They are looked at when a checkpoint is written and when it is read, so weights that are NaN are neither kept in place
of good ones nor computed with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cllm_gpu.checkpoint.safetensors_io import DamagedError

SQUARES = "second_moment"
"""The moment that a root is taken of."""
_PIECE = 1 << 17
"""Elements looked at at a time."""

Array = np.ndarray[Any, Any]


def require_finite(arrays: Mapping[str, Array], where: object, advice: str) -> None:
    """DamagedError naming the first array that holds a NaN or an infinity; `where` and `advice` are for its line."""
    for name, array in arrays.items():
        if not _all(array, lambda piece: np.isfinite(piece)):
            raise DamagedError(f"{where}: {name} holds numbers that are not finite (NaN or infinity); {advice}")


def require_moments(optimizer: Mapping[str, Mapping[str, Array]], where: object, advice: str) -> None:
    """DamagedError naming the first moment that is not finite, or negative though it is a mean of squares."""
    for moment, arrays in optimizer.items():
        require_finite({f"{moment}/{name}": array for name, array in arrays.items()}, where, advice)
        for name, array in arrays.items():
            if moment == SQUARES and not _all(array, lambda piece: piece >= 0):
                raise DamagedError(
                    f"{where}: {moment}/{name} holds negative numbers, and is a mean of squares; {advice}"
                )


def _all(array: Array, holds: Any) -> bool:
    """Whether it holds of every element; of integers always."""
    if array.dtype.kind in "iub":
        return True
    flat = array.reshape(-1)
    return all(bool(holds(flat[start : start + _PIECE]).all()) for start in range(0, flat.size, _PIECE))
