"""Arguments common to the attention kernels: operands, strides, sizes, score bias, symmetry, and the variant."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes, address_of, element_strides, storage_of
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.score_bias import (
    STRIDED,
    check_gradients,
    check_score_bias,
    padded_tokens,
    score_bias_arguments,
    score_bias_defines,
)
from cllm_gpu.ops.cuda.symmetry import check_symmetry, symmetry_arguments, symmetry_defines
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients
from cllm_gpu.ops.reference.symmetry import Symmetry
from cllm_gpu.utils.errors import UserError

MAXIMUM_HEAD_SIZE = 128


class AttentionCall:
    """Checked operands, sizes and variant, shared by the kernels of one call. Raises UserError if invalid."""

    def __init__(
        self,
        operation: str,
        q: Any,
        k: Any,
        v: Any,
        *,
        causal: bool,
        scale: float,
        score_bias: ScoreBias | None,
        symmetry: Symmetry | None,
    ) -> None:
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
        if score_bias is not None:
            check_score_bias(self.check, score_bias)
        if symmetry is not None:
            check_symmetry(self.check, symmetry, size)
        self.score_bias = score_bias
        self._symmetry = symmetry
        self.storage = storage_of(operation, "q", q)
        self.point_gradients = False
        """Whether the variant of the backward also computes the gradients of the score bias's points."""
        self._padded: Any = None
        self._head_size = size
        self._operation = operation
        self._sizes = {
            "sizes.heads": heads,
            "sizes.kv_heads": kv_heads,
            "sizes.queries": length,
            "sizes.keys": positions,
            "sizes.causal": int(causal),
            "sizes.scale": scale,
        }

    def expect_gradients(self, dscore_bias: ScoreBiasGradients | None) -> None:
        """For a backward: check the arrays for the score bias's gradients and select the variant that computes them."""
        if self.score_bias is not None:
            check_gradients(self.check, self.score_bias, dscore_bias)
            self.point_gradients = dscore_bias is not None and dscore_bias.points is not None

    def pad_tokens(self, launcher: Launcher) -> None:
        """Pad the score bias's tokens for the kernels that compare them; call this before the first launch."""
        if self.score_bias is not None and self.score_bias.uses_tokens:
            self._padded = padded_tokens(launcher, self.variant(), self._operation, self.score_bias.tokens)

    def variant(self, source: str = "attention.cu") -> Variant:
        """The variant of `source` for this head size, dtype, score bias and symmetry."""
        defines = (
            *score_bias_defines(self.score_bias, point_gradients=self.point_gradients),
            *symmetry_defines(self._symmetry),
        )
        return Variant(source, self.storage, defines=(("HEAD_SIZE", self._head_size), *defines))

    def strided(self, operands: dict[str, Any]) -> frozenset[str]:
        """Arguments that need not be contiguous: these operands, and what the terms and the symmetry read."""
        return STRIDED.union(operands, {"symmetry.tokens"})

    def arguments(self, **operands: Any) -> dict[str, Any]:
        """Operands with their strides, sizes, symmetry and score terms, as a kernel's struct has them."""
        symmetry = symmetry_arguments(self._operation, self._symmetry)
        terms = score_bias_arguments(self._operation, self.score_bias, self._padded)
        return self.views(**operands) | {"sizes.wide": self.wide(**operands)} | symmetry | terms | self._sizes

    def views(self, **operands: Any) -> dict[str, Any]:
        """Operands with their strides, each as a View of attention.cuh."""
        strides: dict[str, int] = {}
        for name, array in operands.items():
            parts = element_strides(self._operation, name, array)
            strides |= {f"{name}.{axis}": part for axis, part in zip(("batch", "row", "head"), parts, strict=True)}
        return operands | strides

    def wide(self, **operands: Any) -> int:
        """1 if all operands can be read 16 bytes at a time, else 0."""
        for name, array in operands.items():
            width = 16 // array.dtype.itemsize
            parts = (*element_strides(self._operation, name, array), array.shape[3])
            if address_of(array) % 16 or any(part % width for part in parts):
                return 0
        return 1
