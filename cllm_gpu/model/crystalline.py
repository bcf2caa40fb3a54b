"""What crystalline attention adds to the transformer: the lattice's symmetry on queries and keys, and score terms.

The mathematics is that of `reference.symmetry` and `reference.score_bias`; this file gives it the tokens of a batch,
the lattice's tables and the learned scalars, and takes the gradients back. With standard attention every method is
called all the same and does nothing.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.backend import Backend
from cllm_gpu.model.activations import KeyValueCache, LatticeInputs, Workspace
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.lattice import lattice_points, symmetry_turns
from cllm_gpu.model.parameters import FlatParameters
from cllm_gpu.ops.precision import wide_dtype
from cllm_gpu.ops.reference.score_bias import ScoreTermGradients, ScoreTerms
from cllm_gpu.ops.reference.symmetry import Symmetry


class LatticeSide:
    """The lattice's side of a model over `parameters`."""

    def __init__(self, architecture: Architecture, backend: Backend, parameters: FlatParameters) -> None:
        self._architecture, self._backend, self._ops = architecture, backend, backend.ops
        self._parameters, self._lattice = parameters, architecture.lattice
        dtype = wide_dtype(parameters.layout.dtype)
        self._points: Any = None
        self._turns: Any = None
        if self._lattice is not None and self._lattice.uses_points:
            learned = parameters.get("lattice_points")
            table = lattice_points(architecture.vocabulary).astype(dtype) if learned is None else learned
            self._points = backend.asarray(table)
        if architecture.symmetry_pairs:
            self._turns = backend.asarray(symmetry_turns(architecture.symmetry_pairs).astype(dtype))

    def see(self, w: Workspace, tokens: Any, cache: KeyValueCache | None) -> LatticeInputs | None:
        """What the layers need to know of tokens (B, T), which follow those in the cache."""
        if self._lattice is None:
            return None
        points = None
        if self._points is not None:
            table = self._points
            if w.point_table is not None:
                table = w.point_table
                table[...] = self._points
            self._ops.embedding_forward(tokens, table, None, w.points)
            points = w.points.reshape(*tokens.shape, 3)
        seen = tokens
        if cache is not None:
            seen, points = cache.extend_lattice(tokens, points)
        return LatticeInputs(seen, points)

    def symmetry(self, seen: LatticeInputs | None) -> Symmetry | None:
        """The symmetry of the tokens on queries and keys; None where it does not act."""
        return None if seen is None or self._turns is None else Symmetry(seen.tokens, self._turns)

    def terms(self, seen: LatticeInputs | None, layer: int) -> ScoreTerms | None:
        """The score terms of a layer; None where there are none."""
        scalars = self._parameters.get(f"blocks.{layer}.lattice_scalars")
        if seen is None or self._lattice is None or scalars is None:
            return None
        return ScoreTerms(
            tokens=seen.tokens,
            points=seen.points,
            scalars=scalars,
            distance=self._lattice.distance,
            prime_distance=self._lattice.prime_distance,
            same_token=self._lattice.same_token,
            matches=self._lattice.matches,
        )

    def term_gradients(
        self, w: Workspace, gradients: FlatParameters, layer: int, *, accumulate: bool
    ) -> ScoreTermGradients | None:
        """Where a layer adds the gradients of its terms; the last layer, the first of the backward, finds zeros."""
        scalars = gradients.get(f"blocks.{layer}.lattice_scalars")
        if scalars is None:
            return None
        if not accumulate:
            scalars[...] = 0.0
        if w.dpoints is None:
            return ScoreTermGradients(scalars, None)
        if layer == self._architecture.layers - 1:
            w.dpoints[...] = 0.0
        return ScoreTermGradients(scalars, w.dpoints.reshape(w.batch, w.length, 3))

    def point_gradients(self, w: Workspace, tokens: Any, gradients: FlatParameters, *, accumulate: bool) -> None:
        """The gradients of learned points (V, 3) from those at the tokens (B, T)."""
        if w.dpoints is None:
            return
        table = learned = gradients["lattice_points"]
        if w.dpoint_table is not None:  # widened first, rounded once
            table = w.dpoint_table
            if accumulate:
                table[...] = learned
        self._ops.embedding_backward(
            w.dpoints,
            tokens,
            table,
            None,
            accumulate_tokens=accumulate,
            accumulate_positions=False,
            order=w.token_order,
        )
        if table is not learned:
            learned[...] = table
