"""out = x Wᵀ + b and its gradients; see `cllm_gpu.ops.reference.linear`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.native.arguments import address, optional
from cllm_gpu.ops.native.library import Library, check_status


def linear_forward(library: Library, x: Any, weight: Any, bias: Any | None, out: Any) -> None:
    """As the reference; all arrays contiguous."""
    kernels, dtype = library.kernels(x), x.dtype
    (n, k), m = x.shape, weight.shape[0]
    status = kernels.linear_forward(
        kernels.gemm, n, m, k,
        address("x", x, (n, k), dtype),
        address("weight", weight, (m, k), dtype),
        optional("bias", bias, (m,), dtype),
        address("out", out, (n, m), dtype),
    )  # fmt: skip
    if status:
        check_status(status, "linear_forward", 0)


def linear_backward(
    library: Library,
    dout: Any,
    x: Any,
    weight: Any,
    dx: Any | None,
    dweight: Any,
    dbias: Any | None,
    *,
    accumulate: bool,
) -> None:
    """As the reference; all arrays contiguous."""
    kernels, dtype = library.kernels(x), x.dtype
    (n, k), m = x.shape, weight.shape[0]
    status = kernels.linear_backward(
        kernels.gemm, n, m, k,
        address("dout", dout, (n, m), dtype),
        address("x", x, (n, k), dtype),
        address("weight", weight, (m, k), dtype),
        optional("dx", dx, (n, k), dtype),
        address("dweight", dweight, (m, k), dtype),
        optional("dbias", dbias, (m,), dtype),
        accumulate,
    )  # fmt: skip
    if status:
        check_status(status, "linear_backward", 0)
