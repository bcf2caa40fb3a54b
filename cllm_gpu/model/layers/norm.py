"""Layer norm of the residual stream, the branch before it added to the stream in the same operation."""

from __future__ import annotations

from typing import Any

from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.layer import Activation, Layer, ParameterSpec, Pass, PlanRequest
from cllm_gpu.model.recompute import Recompute

EPSILON = 1e-5


class LayerNorm(Layer):
    """The norm before a branch, or, as "final_norm", before the head."""

    def __init__(self, a: Architecture, role: str, block: int | None, site: int) -> None:
        """site: of the dropout between the branch before it and the residual stream."""
        super().__init__(role, block)
        self._a, self._site = a, site
        self._is_first, self._is_final = site == 0, block is None
        if self._is_first:  # no branch comes before it
            self.aliases["residual"] = ("embedding", "output")

    def parameters(self) -> list[ParameterSpec]:
        """weight (C,), bias (C,) where there are biases."""
        specs = [ParameterSpec(f"{self.name}.weight", (self._a.width,), start=1.0)]
        return [*specs, ParameterSpec(f"{self.name}.bias", (self._a.width,))] if self._a.bias else specs

    def activations(self, request: PlanRequest) -> list[Activation]:
        """residual (N, C), the stream with the branch added; normed (N, C); mean and rstd (N,)."""
        rows, width, dtype = request.rows, self._a.width, request.dtype
        stream = self.role.removesuffix("_norm") + "_residual"
        # the stream before the attention is what a whole block is computed again from
        level: Recompute | None = None if self.role == "attention_norm" else "block"
        return [
            Activation("residual", (rows, width), dtype, recomputed=level, diagnosed=stream),
            Activation("normed", (rows, width), dtype, recomputed="pointwise"),
            Activation("mean", (rows,), request.wide),
            Activation("rstd", (rows,), request.wide),
        ]

    def forward(self, x: Pass, stream: Any, branch: Any | None) -> tuple[Any, Any]:
        """The residual stream (N, C) with dropout(branch) added, and its norm (N, C); without a branch the stream."""
        own, p = x.activations[self.name], x.parameters
        weight, bias = p[f"{self.name}.weight"], p.get(f"{self.name}.bias")
        if branch is None:
            x.ops.layernorm_forward(stream, weight, bias, own.normed, own.mean, own.rstd, epsilon=EPSILON)
            return stream, own.normed
        x.ops.residual_layernorm_forward(
            stream, branch, weight, bias, own.residual, own.normed, own.mean, own.rstd,
            epsilon=EPSILON, dropout=x.site(self._site),
        )  # fmt: skip
        return own.residual, own.normed

    def recompute(self, x: Pass) -> None:
        """normed, from the stream, which has the branch before it added already, dropout included."""
        self.forward(x, x.activations[self.name].residual, None)

    def backward(self, x: Pass) -> Any:
        """Add the gradient of the norm's input, from dnormed (N, C), to the stream's, dresidual (N, C).

        The final norm starts the stream's gradient. dnormed and dresidual are of the pass's activations.

        Returns the gradient (N, C) of the branch that was added to the stream before it (of the embedding, at the first
        one): the stream's, through the dropout between them. With dropout it takes the place of dnormed, where it
        stays until the branch's own backward writes there.
        """
        activations, own, dropout = x.activations, x.activations[self.name], x.site(self._site)
        dbranch = None if dropout is None else activations.dnormed
        x.ops.layernorm_backward(
            activations.dnormed, own.residual, x.parameters[f"{self.name}.weight"], own.mean, own.rstd,
            None if self._is_final else activations.dresidual, activations.dresidual, dbranch,
            x.gradients[f"{self.name}.weight"], x.gradients.get(f"{self.name}.bias"),
            accumulate=x.accumulate, dropout=dropout,
        )  # fmt: skip
        return activations.dresidual if dbranch is None else dbranch
