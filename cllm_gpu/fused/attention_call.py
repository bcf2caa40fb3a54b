"""What every attention kernel is given: checked operands with their strides, sizes, score terms, and the variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cllm_gpu.errors import UserError
from cllm_gpu.fused.launcher import Shapes, Variant, address_of, element_strides, storage_of
from cllm_gpu.reference import score_terms as reference

MAXIMUM_HEAD_SIZE = 128
NO_LATTICE = (
    "the lattice is not in the CUDA kernels yet; train with --model.attention standard, or crystalline with "
    "--backend native or numpy"
)
TERM_COUNT = 3  # numbers per head of the score terms: TERM_COUNT in attention.cuh


@dataclass(frozen=True)
class CoordinateTerms:
    """Additive terms of the scores, from numbers of each token (cuda/attention.cuh says which):

    −α_h·‖(x, y)_i − (x, y)_j‖ − β_h·|z_i − z_j| + γ_h·[id_i = id_j]
    """

    coordinates: Any
    """(B, S, 4) float32: x, y, z and an id's bits."""
    weights: Any
    """(H, 3) float32: α, β, γ."""


class AttentionCall:
    """What the kernels of one call share: the checked operands, their sizes and the variant. UserError where wrong."""

    def __init__(
        self,
        operation: str,
        q: Any,
        k: Any,
        v: Any,
        *,
        causal: bool,
        scale: float,
        terms: CoordinateTerms | reference.ScoreTerms | None,
    ) -> None:
        if isinstance(terms, reference.ScoreTerms):
            raise UserError(f"{operation}: {NO_LATTICE}")
        self.check = Shapes(operation)
        _, length, heads, size = self.check("q", q, "B T H D")
        _, positions, kv_heads, _ = self.check("k", k, "B S K D")
        self.check("v", v, "B S K D")
        if not 1 <= size <= MAXIMUM_HEAD_SIZE:
            raise UserError(f"{operation}: argument q has head size {size}; at most {MAXIMUM_HEAD_SIZE} is supported")
        if heads % kv_heads:
            raise UserError(f"{operation}: argument k has {kv_heads} heads, which do not divide q's {heads}")
        if causal and positions < length:
            raise UserError(f"{operation}: argument k has {positions} positions, fewer than the {length} queries")
        if not (scale > 0.0):
            raise UserError(f"{operation}: argument scale is {scale}; it must be above 0")
        if positions == 0:
            raise UserError(f"{operation}: argument k has no position")
        self.terms = terms
        if terms is not None:
            self.check("terms.coordinates", terms.coordinates, "B S 4")
            if terms.coordinates.shape[2] != 4 or tuple(terms.weights.shape) != (heads, TERM_COUNT):
                shapes = f"{terms.coordinates.shape} and {terms.weights.shape}"
                raise UserError(f"{operation}: terms have shapes {shapes}; they must be (B, S, 4) and (H, 3)")
            if address_of(terms.coordinates) % 16:
                raise UserError(f"{operation}: terms.coordinates are not aligned to 16 bytes")
        self.head_size = size
        self.variant = self._variant("attention.cu", storage_of(operation, "q", q))
        self.fused_variant = self._variant("attention_fused.cu", self.variant.storage)
        self._operation = operation
        self._sizes = {
            "heads": heads,
            "kv_heads": kv_heads,
            "queries": length,
            "keys": positions,
            "causal": int(causal),
            "scale": scale,
        }

    def _variant(self, source: str, storage: str) -> Variant:
        defines = (("HEAD_SIZE", self.head_size), ("SCORE_TERMS", int(self.terms is not None)))
        return Variant(source, storage, defines=defines)

    def arguments(self, **operands: Any) -> dict[str, Any]:
        """Operands with their strides, sizes and score terms, as a kernel takes them."""
        coordinates = None if self.terms is None else self.terms.coordinates
        weights = None if self.terms is None else self.terms.weights
        return self.operands(**operands) | {"coordinates": coordinates, "term_weights": weights} | self._sizes

    def operands(self, **operands: Any) -> dict[str, Any]:
        """Operands with their strides, and whether all of them can be read 16 bytes at a time."""
        wide = True
        strides: dict[str, int] = {}
        for name, array in operands.items():
            parts = element_strides(self._operation, name, array)
            strides |= {f"{name}_{axis}": part for axis, part in zip(("batch", "row", "head"), parts, strict=True)}
            width = 16 // array.dtype.itemsize
            aligned = address_of(array) % 16 == 0 and all(part % width == 0 for part in parts)
            wide = wide and aligned and array.shape[3] % width == 0
        return operands | strides | {"wide": int(wide)}
