"""What crystalline attention sees: the tokens' lattice points and symmetry elements, and the terms of the scores.

The mathematics is that of `ops.reference.symmetry` and `ops.reference.score_bias`; this file gives it the tokens of a
batch, the lattice's tables and the learned scalars, and takes the gradients back.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.backend import Backend
from cllm_gpu.model.architecture import Architecture, LatticeTerms
from cllm_gpu.model.lattice import LatticeInputs, lattice_points, symmetry_turns
from cllm_gpu.model.layers.layer import Activation, Layer, ParameterSpec, Pass, PlanRequest, Temporary
from cllm_gpu.ops.precision import is_narrow
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients
from cllm_gpu.ops.reference.symmetry import Symmetry


class Crystalline(Layer):
    """The lattice's side of all blocks: one layer of the model, which the attention of every block asks."""

    optional = ("point_table", "dpoints", "dpoint_table")

    def __init__(self, a: Architecture, lattice: LatticeTerms) -> None:
        super().__init__("lattice")
        self._a, self._lattice = a, lattice

    def parameters(self) -> list[ParameterSpec]:
        """lattice_points (V, 3) where they are learned."""
        if not self._lattice.learned_points:
            return []
        shape = (self._a.vocabulary, 3)
        return [ParameterSpec("lattice_points", shape, start="lattice", lattice=True, looked_up=True)]

    def block_parameters(self, block: int) -> list[ParameterSpec]:
        """lattice_scalars (H, number of terms) of a block; none where no term has one."""
        if not self._lattice.scalars:
            return []
        shape = (self._a.heads, len(self._lattice.scalars))
        return [ParameterSpec(_scalars(block), shape, start=self._lattice.start, lattice=True)]

    def activations(self, request: PlanRequest) -> list[Activation]:
        """points (N, 3) of the tokens, where a term sees them; never below float32: their differences would be of 8
        bits. point_table (V, 3): learned points widened, where they are narrower.
        """
        if not self._lattice.uses_points:
            return []
        planned = [Activation("points", (request.rows, 3), request.wide)]
        if self._widens(request):
            planned.append(Activation("point_table", (self._a.vocabulary, 3), request.wide))
        return planned

    def temporaries(self, request: PlanRequest) -> list[Temporary]:
        """dpoints (N, 3) of learned points; dpoint_table (V, 3), where the points are narrower."""
        if not self._lattice.learned_points:
            return []
        planned = [Temporary("dpoints", (request.rows, 3), request.wide)]
        if self._widens(request):
            planned.append(Temporary("dpoint_table", (self._a.vocabulary, 3), request.wide))
        return planned

    def _widens(self, request: PlanRequest) -> bool:
        return self._lattice.learned_points and is_narrow(request.dtype)

    def constants(self, backend: Backend, dtype: Any) -> dict[str, Any]:
        """points (V, 3) unless they are learned; turns (24, P, 2) of the symmetry's elements."""
        tables: dict[str, Any] = {}
        if self._lattice.uses_points and not self._lattice.learned_points:
            tables["points"] = backend.asarray(lattice_points(self._a.vocabulary).astype(dtype))
        if self._a.symmetry_pairs:
            tables["turns"] = backend.asarray(symmetry_turns(self._a.symmetry_pairs).astype(dtype))
        return tables

    def forward(self, x: Pass) -> LatticeInputs:
        """What the blocks need to know of the tokens (B, T), which follow those in the cache."""
        tokens, points = x.tokens, None
        if self._lattice.uses_points:
            own = x.activations[self.name]
            table = x.parameters["lattice_points"] if self._lattice.learned_points else self._constant(x, "points")
            if own.point_table is not None:
                own.point_table[...] = table
                table = own.point_table
            x.ops.embedding_forward(tokens, table, None, own.points)
            points = own.points.reshape(*tokens.shape, 3)
        if x.cache is not None:
            tokens, points = x.cache.extend_lattice(tokens, points)
        return LatticeInputs(tokens, points)

    def symmetry(self, x: Pass) -> Symmetry | None:
        """The symmetry of the tokens on queries and keys; None if it acts on no dimension."""
        turns = self._constant(x, "turns")
        return None if turns is None else Symmetry(x.activations.lattice.tokens, turns)

    def score_bias(self, x: Pass, block: int) -> ScoreBias | None:
        """The terms of a block's scores; None if there are none."""
        scalars, seen = x.parameters.get(_scalars(block)), x.activations.lattice
        if scalars is None:
            return None
        return ScoreBias(
            tokens=seen.tokens,
            points=seen.points,
            scalars=scalars,
            distance=self._lattice.distance,
            prime_distance=self._lattice.prime_distance,
            same_token=self._lattice.same_token,
            matches=self._lattice.matches,
        )

    def score_bias_gradients(self, x: Pass, block: int) -> ScoreBiasGradients | None:
        """Where a block adds the gradients of its terms; the last block, the first of the backward, finds zeros."""
        scalars, dpoints = x.gradients.get(_scalars(block)), x.activations[self.name].dpoints
        if scalars is None:
            return None
        if not x.accumulate:
            scalars[...] = 0.0
        if dpoints is None:
            return ScoreBiasGradients(scalars, None)
        if block == self._a.layers - 1:
            dpoints[...] = 0.0
        return ScoreBiasGradients(scalars, dpoints.reshape(x.activations.batch, x.activations.length, 3))

    def backward(self, x: Pass) -> None:
        """The gradients of learned points (V, 3) from those at the tokens."""
        own = x.activations[self.name]
        if own.dpoints is None:
            return
        table = learned = x.gradients["lattice_points"]
        if own.dpoint_table is not None:  # widened first, rounded once
            table = own.dpoint_table
            if x.accumulate:
                table[...] = learned
        x.ops.embedding_backward(
            own.dpoints, x.tokens, table, None,
            accumulate_tokens=x.accumulate, accumulate_positions=False, order=x.activations.token_order,
        )  # fmt: skip
        if table is not learned:
            learned[...] = table

    def _constant(self, x: Pass, name: str) -> Any | None:
        return x.constants[self.name].get(name)


def _scalars(block: int) -> str:
    return f"blocks.{block}.lattice_scalars"
