"""Rotary position embedding: launches cuda/rotary.cu. As `cllm_gpu.reference.rotary`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.errors import UserError
from cllm_gpu.fused.launcher import Launcher, Shapes, Variant, blocks_for, element_strides, storage_of

THREADS = 256


def rotary_forward(launcher: Launcher, x: Any, cosine: Any, sine: Any) -> None:
    """Rotate x (B, T, H, D), any strides with the last axis contiguous, in place by the tables' rows (T, D/2).

    The tables are float32, or of x's dtype.
    """
    _launch("rotary_forward", launcher, "x", x, cosine, sine, 1.0)


def rotary_backward(launcher: Launcher, dx: Any, cosine: Any, sine: Any) -> None:
    """Rotate the gradient dx (B, T, H, D) back in place."""
    _launch("rotary_backward", launcher, "dx", dx, cosine, sine, -1.0)


def _launch(operation: str, launcher: Launcher, name: str, x: Any, cosine: Any, sine: Any, direction: float) -> None:
    check = Shapes(operation)
    batch, length, heads, size = check(name, x, "B T H D")
    if size % 2:
        raise UserError(f"{operation}: argument {name} has shape {x.shape}; its last axis must be even")
    half = size // 2
    for table_name, table in (("cosine", cosine), ("sine", sine)):
        if tuple(table.shape) != (length, half):
            raise UserError(f"{operation}: argument {table_name} has shape {table.shape}; it must be {(length, half)}")
    batch_stride, row_stride, head_stride = element_strides(operation, name, x)
    pairs = batch * length * heads * half
    storage = storage_of(operation, name, x)
    real_table = storage != "float32" and cosine.dtype.name == storage
    launcher.launch(
        Variant("rotary.cu", storage, defines=(("CLLM_REAL_TABLE", 1),) if real_table else ()),
        "rotary",
        (blocks_for(pairs, THREADS),),
        THREADS,
        {
            "x": x,
            "cosine": cosine,
            "sine": sine,
            "batch_stride": batch_stride,
            "row_stride": row_stride,
            "head_stride": head_stride,
            "pairs": pairs,
            "length": length,
            "heads": heads,
            "half": half,
            "direction": direction,
        },
        strided=frozenset({"x"}),
    )
