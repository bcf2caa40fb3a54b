"""The MLP of a block: out = gelu(x Uᵀ + a) Dᵀ + b, two linear layers with GELU between them.

Backward: dD = doutᵀ g and db = Σ_rows dout with g = gelu(h);  dh = (dout D) ⊙ gelu'(h);  dU = dhᵀ x, da = Σ_rows dh,
dx = dh U. Saved for the backward: h, including the bias a, and g.

It is composed of other operations, given as arguments to `forward_of` and `backward_of`: in bfloat16 each of them
rounds its own result, so the saved arrays are what the next operation reads.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.reference import gelu, linear
from cllm_gpu.ops.specification import Operation, operation


def forward_of(linear_forward: Operation, gelu_forward: Operation) -> Operation:
    """mlp_forward composed of these operations."""

    @operation(writes=("hidden", "activated", "out"))
    def mlp_forward(
        xp: Any,
        x: Any,
        up_weight: Any,
        up_bias: Any | None,
        down_weight: Any,
        down_bias: Any | None,
        hidden: Any,
        activated: Any,
        out: Any | None,
    ) -> None:
        """hidden (N, M) = x (N, C) · up_weight (M, C)ᵀ + up_bias (M), activated (N, M) = gelu(hidden), and
        out (N, C) = activated · down_weight (C, M)ᵀ + down_bias (C); None to compute only what the backward needs."""
        linear_forward(xp, x, up_weight, None, hidden)
        gelu_forward(xp, hidden, up_bias, activated)
        if out is not None:
            linear_forward(xp, activated, down_weight, down_bias, out)

    return mlp_forward


def backward_of(linear_backward: Operation, gelu_backward: Operation) -> Operation:
    """mlp_backward composed of these operations."""

    @operation(writes=("dhidden", "dx", "dup_weight", "dup_bias", "ddown_weight", "ddown_bias"))
    def mlp_backward(
        xp: Any,
        dout: Any,
        x: Any,
        hidden: Any,
        activated: Any,
        up_weight: Any,
        down_weight: Any,
        dhidden: Any,
        dx: Any,
        dup_weight: Any,
        dup_bias: Any | None,
        ddown_weight: Any,
        ddown_bias: Any | None,
        *,
        accumulate: bool,
    ) -> None:
        """From dout (N, C) and the saved values: dhidden (N, M), dx (N, C), and the parameter gradients.

        `dx` may be `dout`.
        """
        linear_backward(xp, dout, activated, down_weight, dhidden, ddown_weight, ddown_bias, accumulate=accumulate)
        gelu_backward(xp, dhidden, hidden, dhidden, dup_bias, accumulate=accumulate)
        linear_backward(xp, dhidden, x, up_weight, dx, dup_weight, None, accumulate=accumulate)

    return mlp_backward


mlp_forward = forward_of(linear.linear_forward, gelu.gelu_forward)
mlp_backward = backward_of(linear.linear_backward, gelu.gelu_backward)
