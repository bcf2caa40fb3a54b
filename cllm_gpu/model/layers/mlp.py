"""The multilayer perceptron of a block: up, GELU, down."""

from __future__ import annotations

from typing import Any

from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.layer import (
    INITIAL_DEVIATION,
    Activation,
    Layer,
    ParameterSpec,
    Pass,
    PlanRequest,
    Temporary,
    branch_deviation,
    linear_specs,
)


class MLP(Layer):
    """down · gelu(up · x)."""

    def __init__(self, a: Architecture, block: int) -> None:
        super().__init__("mlp", block)
        self._a = a
        self._up, self._down = f"{self.prefix}mlp_up", f"{self.prefix}mlp_down"

    def parameters(self) -> list[ParameterSpec]:
        """mlp_up (M, C) and mlp_down (C, M), weight and bias each."""
        a = self._a
        return [
            *linear_specs(self._up, a.mlp_width, a.width, INITIAL_DEVIATION, bias=a.bias),
            *linear_specs(self._down, a.width, a.mlp_width, branch_deviation(a.layers), bias=a.bias),
        ]

    def activations(self, request: PlanRequest) -> list[Activation]:
        """hidden (N, M) before GELU, the bias included, and activated (N, M) after."""
        shape, dtype = (request.rows, self._a.mlp_width), request.dtype
        return [
            Activation("hidden", shape, dtype, diagnosed="hidden"),
            Activation("activated", shape, dtype, recomputed="pointwise", diagnosed="activated"),
        ]

    def temporaries(self, request: PlanRequest) -> list[Temporary]:
        """dhidden (N, M)."""
        return [Temporary("dhidden", (request.rows, self._a.mlp_width), request.dtype, pool="inside_a_branch")]

    def forward(self, x: Pass, normed: Any, out: Any | None) -> Any:
        """The branch (N, C) in `out`, from normed (N, C); None: only what the backward needs."""
        own, p = x.activations[self.name], x.parameters
        x.ops.mlp_forward(
            normed, p[f"{self._up}.weight"], p.get(f"{self._up}.bias"), p[f"{self._down}.weight"],
            p.get(f"{self._down}.bias"), own.hidden, own.activated, out,
        )  # fmt: skip
        return out

    def recompute(self, x: Pass) -> None:
        """activated, from hidden."""
        own = x.activations[self.name]
        x.ops.gelu_forward(own.hidden, None, own.activated)

    def backward(self, x: Pass, dbranch: Any, normed: Any) -> None:
        """The gradient of `normed`, in dnormed (N, C), and those of the parameters, from dbranch (N, C)."""
        own, p, g = x.activations[self.name], x.parameters, x.gradients
        up, down = f"{self._up}.weight", f"{self._down}.weight"
        x.ops.mlp_backward(
            dbranch, normed, own.hidden, own.activated, p[up], p[down], own.dhidden, x.activations.dnormed,
            g[up], g.get(f"{self._up}.bias"), g[down], g.get(f"{self._down}.bias"), accumulate=x.accumulate,
        )  # fmt: skip
