"""Softmax cross-entropy and its gradient in the logits' buffer; see `cllm_gpu.ops.reference.cross_entropy`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.native.arguments import INT32, address
from cllm_gpu.ops.native.library import Library, check_status


def cross_entropy(
    library: Library, logits: Any, targets: Any, losses: Any, *, ignore_index: int, gradient_scale: float | None
) -> None:
    """As the reference; all arrays contiguous. Raises IndexError for a target that is out of range and not ignored."""
    kernels, dtype = library.kernels(logits), logits.dtype
    n, v = logits.shape
    status = kernels.cross_entropy(
        n, v,
        address("logits", logits, (n, v), dtype),
        address("targets", targets, (n,), INT32),
        address("losses", losses, (n,), dtype),
        ignore_index,
        gradient_scale is not None,
        gradient_scale or 0.0,
    )  # fmt: skip
    if status:
        check_status(status, "targets", v)
