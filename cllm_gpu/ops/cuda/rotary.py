"""Rotary position embedding: launches cuda/rotary.cu. As `cllm_gpu.ops.reference.rotary`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes, blocks_for, element_strides, storage_of
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.symmetry import check_symmetry, symmetry_arguments, symmetry_defines
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.reference.symmetry import Symmetry
from cllm_gpu.utils.errors import UserError

THREADS = 256


def rotary_forward(launcher: Launcher, x: Any, cosine: Any, sine: Any, *, symmetry: Symmetry | None = None) -> None:
    """As the reference; the last axis of x contiguous, the tables float32 or of x's dtype."""
    _launch("rotary_forward", launcher, "x", x, cosine, sine, symmetry, 1.0)


def rotary_backward(launcher: Launcher, dx: Any, cosine: Any, sine: Any, *, symmetry: Symmetry | None = None) -> None:
    """As the reference; the last axis of dx contiguous, the tables float32 or of dx's dtype."""
    _launch("rotary_backward", launcher, "dx", dx, cosine, sine, symmetry, -1.0)


def _launch(
    operation: str,
    launcher: Launcher,
    name: str,
    x: Any,
    cosine: Any,
    sine: Any,
    symmetry: Symmetry | None,
    direction: float,
) -> None:
    check = Shapes(operation)
    batch, length, heads, size = check(name, x, "B T H D")
    if size % 2:
        raise UserError(f"{operation}: argument {name} has shape {x.shape}; its last axis must be even")
    half = size // 2
    for table_name, table in (("cosine", cosine), ("sine", sine)):
        if tuple(table.shape) != (length, half):
            raise UserError(f"{operation}: argument {table_name} has shape {table.shape}; it must be {(length, half)}")
    positions = length
    if symmetry is not None:
        check_symmetry(check, symmetry, size)
        positions = symmetry.tokens.shape[1]
        if positions < length or half > THREADS:
            raise UserError(
                f"{operation}: the symmetry of {positions} tokens on {length} positions of head size {size}; "
                f"it takes as many tokens as positions or more, and a head size of at most {2 * THREADS}"
            )
    batch_stride, row_stride, head_stride = element_strides(operation, name, x)
    pairs = batch * length * heads * half
    storage = storage_of(operation, name, x)
    real_table = storage != "float32" and cosine.dtype.name == storage
    table_defines = (("CLLM_REAL_TABLE", 1),) if real_table else ()
    of_block = THREADS if symmetry is None else THREADS // half * half  # whole heads per block
    launcher.launch(
        Variant("rotary.cu", storage, defines=(*table_defines, *symmetry_defines(symmetry))),
        "rotary",
        (blocks_for(pairs, of_block),),
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
            "positions": positions,
        }
        | symmetry_arguments(operation, symmetry),
        strided=frozenset({"x", "symmetry.tokens"}),
    )
