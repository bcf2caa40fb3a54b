"""Layer norm of the residual stream."""

from __future__ import annotations

from typing import Any

from cllm_gpu.model.layers.layer import Activation, ParameterSpec, Pass, PlanRequest
from cllm_gpu.model.layers.norm import Norm
from cllm_gpu.ops.reference.dropout import Dropout

EPSILON = 1e-5


class LayerNorm(Norm):
    """Each row less its mean, over its standard deviation; weight and bias."""

    def parameters(self) -> list[ParameterSpec]:
        """weight (C,), bias (C,) where there are biases."""
        specs = [ParameterSpec(f"{self.name}.weight", (self._a.width,), start=1.0)]
        return [*specs, ParameterSpec(f"{self.name}.bias", (self._a.width,))] if self._a.bias else specs

    def statistics(self, request: PlanRequest) -> list[Activation]:
        """mean and rstd (N,)."""
        return [Activation(name, (request.rows,), request.wide) for name in ("mean", "rstd")]

    def normalise(self, x: Pass, stream: Any) -> None:
        """As `Norm.normalise`."""
        own, weight, bias = x.activations[self.name], *self._weights(x)
        x.ops.layernorm_forward(stream, weight, bias, own.normed, own.mean, own.rstd, epsilon=EPSILON)

    def add_and_normalise(self, x: Pass, stream: Any, branch: Any, dropout: Dropout | None) -> None:
        """As `Norm.add_and_normalise`."""
        own, weight, bias = x.activations[self.name], *self._weights(x)
        x.ops.residual_layernorm_forward(
            stream, branch, weight, bias, own.residual, own.normed, own.mean, own.rstd,
            epsilon=EPSILON, dropout=dropout,
        )  # fmt: skip

    def normalise_backward(self, x: Pass, dresidual: Any | None, dbranch: Any | None, dropout: Dropout | None) -> None:
        """As `Norm.normalise_backward`."""
        own, weight, _ = x.activations[self.name], *self._weights(x)
        x.ops.layernorm_backward(
            x.activations.dnormed, own.residual, weight, own.mean, own.rstd,
            dresidual, x.activations.dresidual, dbranch,
            x.gradients[f"{self.name}.weight"], x.gradients.get(f"{self.name}.bias"),
            accumulate=x.accumulate, dropout=dropout,
        )  # fmt: skip

    def _weights(self, x: Pass) -> tuple[Any, Any | None]:
        return x.parameters[f"{self.name}.weight"], x.parameters.get(f"{self.name}.bias")
