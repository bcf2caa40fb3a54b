"""The MLP of a block, with GELU and its gradient as epilogues of the preceding products.

As `cllm_gpu.ops.reference.mlp`. If no epilogue is available (see `gemm`), cuda/gelu.cu follows the product. GELU is
then computed from `hidden` as stored; in the epilogue, from the same value before rounding.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes
from cllm_gpu.ops.cuda.epilogue import Epilogue
from cllm_gpu.ops.cuda.gelu import gelu_backward, gelu_forward
from cllm_gpu.ops.cuda.gemm import matmul, matmul_with
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.linear import linear_backward, linear_forward


def mlp_forward(
    launcher: Launcher,
    x: Any,
    up_weight: Any,
    up_bias: Any | None,
    down_weight: Any,
    down_bias: Any | None,
    hidden: Any,
    activated: Any,
    out: Any | None,
) -> None:
    """As the reference."""
    check = Shapes("mlp_forward")
    for name, array, letters in (
        ("x", x, "N C"),
        ("up_weight", up_weight, "M C"),
        ("up_bias", up_bias, "M"),
        ("hidden", hidden, "N M"),
        ("activated", activated, "N M"),
    ):
        check(name, array, letters)
    if not matmul_with(launcher, x, up_weight.T, activated, Epilogue("gelu", up_bias, hidden)):
        linear_forward(launcher, x, up_weight, None, hidden)
        gelu_forward(launcher, hidden, up_bias, activated)
    if out is not None:
        linear_forward(launcher, activated, down_weight, down_bias, out)


def mlp_backward(
    launcher: Launcher,
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
    """As the reference."""
    check = Shapes("mlp_backward")
    for name, array, letters in (
        ("dout", dout, "N C"),
        ("hidden", hidden, "N M"),
        ("down_weight", down_weight, "C M"),
        ("dhidden", dhidden, "N M"),
        ("dup_bias", dup_bias, "M"),
    ):
        check(name, array, letters)
    linear_backward(launcher, dout, activated, down_weight, None, ddown_weight, ddown_bias, accumulate=accumulate)
    rest = _hidden_gradient(launcher, dout, hidden, down_weight, dhidden, dup_bias, accumulate=accumulate)
    linear_backward(launcher, dhidden, x, up_weight, dx, dup_weight, rest, accumulate=accumulate)


def _hidden_gradient(
    launcher: Launcher,
    dout: Any,
    hidden: Any,
    down_weight: Any,
    dhidden: Any,
    dup_bias: Any | None,
    *,
    accumulate: bool,
) -> Any | None:
    """dhidden = (dout · down_weight) ⊙ gelu'(hidden). Returns dup_bias if it is still to be summed, else None.

    The epilogue overwrites dup_bias and needs dhidden's dtype; otherwise the next product sums it.
    """
    product = (launcher, dout, down_weight, dhidden)
    if dup_bias is not None and not accumulate and matmul_with(*product, Epilogue("gelu gradient", dup_bias, hidden)):
        return None
    if matmul_with(*product, Epilogue("gelu gradient", None, hidden)):
        return dup_bias
    matmul(*product)
    gelu_backward(launcher, dhidden, hidden, dhidden, dup_bias, accumulate=accumulate)
    return None
