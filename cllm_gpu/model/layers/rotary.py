"""Rotary position embedding of queries and keys (RoPE), for attention."""

from __future__ import annotations

from typing import Any

from cllm_gpu.backend import Backend
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.layer import Layer, Pass
from cllm_gpu.ops.reference.rotary import rotary_tables
from cllm_gpu.ops.reference.symmetry import Symmetry


class Rotary(Layer):
    """Turns pairs of a head's dimensions by angles proportional to the position; one for all blocks."""

    def __init__(self, a: Architecture) -> None:
        super().__init__("rotary")
        self._a = a

    def constants(self, backend: Backend, dtype: Any) -> dict[str, Any]:
        """cosine and sine (T, D/2) of every position's angles."""
        cosine, sine = rotary_tables(backend.xp, self._a.context, self._a.head_size, dtype)
        return {"cosine": backend.asarray(cosine), "sine": backend.asarray(sine)}

    def forward(self, x: Pass, q: Any, k: Any, symmetry: Symmetry | None) -> None:
        """Turn q (B, T, H, D) and k (B, T, K, D) in place; the lattice's symmetry acts before the turn."""
        self._turn(x, x.ops.rotary_forward, q, k, x.first_position, symmetry)

    def backward(self, x: Pass, dq: Any, dk: Any, symmetry: Symmetry | None) -> None:
        """Turn dq and dk, shaped as q and k, back in place, then undo the symmetry."""
        self._turn(x, x.ops.rotary_backward, dq, dk, 0, symmetry)

    def _turn(self, x: Pass, operation: Any, q: Any, k: Any, first: int, symmetry: Symmetry | None) -> None:
        tables = x.constants[self.name]
        cosine, sine = (tables[name][first : first + q.shape[1]] for name in ("cosine", "sine"))
        for array in (q, k):
            operation(array, cosine, sine, symmetry=symmetry)
