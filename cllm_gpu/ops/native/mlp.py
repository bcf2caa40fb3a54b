"""The MLP of a block, composed of linear and GELU; see `cllm_gpu.ops.reference.mlp`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.native.gelu import gelu_backward, gelu_forward
from cllm_gpu.ops.native.library import Library
from cllm_gpu.ops.native.linear import linear_backward, linear_forward


def mlp_forward(
    library: Library,
    x: Any,
    up_weight: Any,
    up_bias: Any | None,
    down_weight: Any,
    down_bias: Any | None,
    hidden: Any,
    activated: Any,
    out: Any | None,
) -> None:
    """As the reference; all arrays contiguous."""
    linear_forward(library, x, up_weight, None, hidden)
    gelu_forward(library, hidden, up_bias, activated)
    if out is not None:
        linear_forward(library, activated, down_weight, down_bias, out)


def mlp_backward(
    library: Library,
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
    """As the reference; all arrays contiguous."""
    linear_backward(library, dout, activated, down_weight, dhidden, ddown_weight, ddown_bias, accumulate=accumulate)
    gelu_backward(library, dhidden, hidden, dhidden, dup_bias, accumulate=accumulate)
    linear_backward(library, dhidden, x, up_weight, dx, dup_weight, None, accumulate=accumulate)
