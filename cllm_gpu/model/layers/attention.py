"""Multi-head self-attention of a block: qkv, attention with RoPE and the lattice's terms, projection."""

from __future__ import annotations

import math
from typing import Any

from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.crystalline import Crystalline
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
from cllm_gpu.model.layers.rotary import Rotary
from cllm_gpu.ops.reference.symmetry import Symmetry


class Attention(Layer):
    """Causal, with K key/value heads (grouped-query attention where K < H)."""

    def __init__(self, a: Architecture, block: int, rotary: Rotary | None, crystalline: Crystalline | None) -> None:
        super().__init__("attention", block)
        self._a, self._block = a, block
        self._rotary, self._crystalline = rotary, crystalline
        self._scale = 1.0 / math.sqrt(a.head_size)
        self._qkv, self._projection = f"{self.prefix}qkv", f"{self.prefix}projection"

    def parameters(self) -> list[ParameterSpec]:
        """qkv (C + 2·K·D, C) and projection (C, C), weight and bias each; the lattice's scalars of this block."""
        a = self._a
        specs = linear_specs(self._qkv, a.qkv_width, a.width, INITIAL_DEVIATION, bias=a.bias)
        specs += linear_specs(self._projection, a.width, a.width, branch_deviation(a.layers), bias=a.bias)
        return specs if self._crystalline is None else specs + self._crystalline.block_parameters(self._block)

    def activations(self, request: PlanRequest) -> list[Activation]:
        """qkv (N, C + 2·K·D); lse (B, H, T), log-sum-exp of a query's scores; attended (N, C)."""
        a, dtype = self._a, request.dtype
        return [
            Activation("qkv", (request.rows, a.qkv_width), dtype, diagnosed="qkv"),
            Activation("lse", (request.batch, a.heads, request.length), request.wide, diagnosed="lse"),
            Activation("attended", (request.rows, a.width), dtype, diagnosed="attended"),
        ]

    def temporaries(self, request: PlanRequest) -> list[Temporary]:
        """dattended (N, C), dqkv (N, C + 2·K·D)."""
        return [
            Temporary("dattended", (request.rows, self._a.width), request.dtype),
            Temporary("dqkv", (request.rows, self._a.qkv_width), request.dtype, pool="inside_a_branch"),
        ]

    def forward(self, x: Pass, normed: Any) -> Any:
        """The branch (N, C), from normed (N, C)."""
        own = x.activations[self.name]
        x.linear(self._qkv, normed, own.qkv)
        q, k, v = self._heads(x, own.qkv)
        for_rotary, symmetry = self._symmetries(x)
        if self._rotary is not None:
            self._rotary.forward(x, q, k, for_rotary)
        if x.cache is not None:
            k, v = x.cache.extend(self._block, k, v)  # (B, S, K, D)
        x.ops.attention_forward(
            q, k, v, self._split(x, own.attended), own.lse, causal=True, scale=self._scale,
            score_bias=self._score_bias(x), symmetry=symmetry,
        )  # fmt: skip
        x.linear(self._projection, own.attended, x.activations.branch)
        return x.activations.branch

    def backward(self, x: Pass, dbranch: Any, normed: Any) -> None:
        """The gradient of `normed`, in dnormed (N, C), and those of the parameters, from dbranch (N, C)."""
        own = x.activations[self.name]
        x.linear_backward(self._projection, dbranch, own.attended, own.dattended)
        q, k, v = self._heads(x, own.qkv)
        dq, dk, dv = self._heads(x, own.dqkv)
        for_rotary, symmetry = self._symmetries(x)
        dscore_bias = None if self._crystalline is None else self._crystalline.score_bias_gradients(x, self._block)
        x.ops.attention_backward(
            self._split(x, own.dattended), q, k, v, self._split(x, own.attended), own.lse, dq, dk, dv,
            causal=True, scale=self._scale, score_bias=self._score_bias(x), dscore_bias=dscore_bias, symmetry=symmetry,
        )  # fmt: skip
        if self._rotary is not None:
            self._rotary.backward(x, dq, dk, for_rotary)
        x.linear_backward(self._qkv, own.dqkv, normed, x.activations.dnormed)

    def weights(self, x: Pass, *, score_bias: bool) -> Any:
        """Attention weights (B, H, T, T) of the last forward, for inspection; optionally without the score bias."""
        q, k, _ = self._heads(x, x.activations[self.name].qkv)
        _, symmetry = self._symmetries(x)
        added = self._score_bias(x) if score_bias else None
        return x.ops.attention_weights(q, k, causal=True, scale=self._scale, score_bias=added, symmetry=symmetry)

    def _score_bias(self, x: Pass) -> Any:
        return None if self._crystalline is None else self._crystalline.score_bias(x, self._block)

    def _symmetries(self, x: Pass) -> tuple[Symmetry | None, Symmetry | None]:
        """The lattice's symmetry for the rotary embedding and for attention: whichever takes q and k first."""
        symmetry = None if self._crystalline is None else self._crystalline.symmetry(x)
        return (None, symmetry) if self._rotary is None else (symmetry, None)

    def _split(self, x: Pass, array: Any) -> Any:
        """(N, H·D) as (B, T, H, D)."""
        return array.reshape(x.activations.batch, x.activations.length, -1, self._a.head_size)

    def _heads(self, x: Pass, qkv: Any) -> tuple[Any, Any, Any]:
        """Views of qkv (N, C + 2·K·D): queries (B, T, H, D), keys and values (B, T, K, D)."""
        a, heads = self._a, self._split(x, qkv)
        keys, values = a.heads, a.heads + a.kv_heads
        return heads[:, :, :keys], heads[:, :, keys:values], heads[:, :, values:]
