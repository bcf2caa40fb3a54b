"""Keys and values of the tokens that were read already, for generation."""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm_gpu.backend import Backend
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.ops.precision import wide_dtype


class KeyValueCache:
    """Keys and values of every layer for up to `capacity` positions; `length` positions are filled.

    With crystalline attention also the tokens at those positions, and their lattice points where a term sees them.
    """

    def __init__(self, architecture: Architecture, backend: Backend, batch: int, capacity: int, dtype: Any) -> None:
        shape = (architecture.layers, batch, capacity, architecture.kv_heads, architecture.head_size)
        self._keys = backend.xp.empty(shape, dtype)
        self._values = backend.xp.empty(shape, dtype)
        lattice = architecture.lattice
        self._tokens = None if lattice is None else backend.xp.empty((batch, capacity), np.int32)
        has_points = lattice is not None and lattice.uses_points
        self._points = backend.xp.empty((batch, capacity, 3), wide_dtype(dtype)) if has_points else None
        self.capacity = capacity
        self.length = 0

    def extend(self, layer: int, k: Any, v: Any) -> tuple[Any, Any]:
        """Append k and v (B, T, K, D) of one layer; all keys and values so far, (B, S, K, D)."""
        end = self.length + k.shape[1]
        self._keys[layer, :, self.length : end] = k
        self._values[layer, :, self.length : end] = v
        return self._keys[layer, :, :end], self._values[layer, :, :end]

    def extend_lattice(self, tokens: Any, points: Any | None) -> tuple[Any, Any | None]:
        """Append tokens (B, T) and points (B, T, 3); all so far, (B, S) and (B, S, 3)."""
        end = self.length + tokens.shape[1]
        assert self._tokens is not None
        self._tokens[:, self.length : end] = tokens
        if self._points is None:
            return self._tokens[:, :end], None
        self._points[:, self.length : end] = points
        return self._tokens[:, :end], self._points[:, :end]
