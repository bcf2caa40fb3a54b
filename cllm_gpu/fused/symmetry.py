"""The lattice's symmetry on head dimensions: launches cuda/symmetry.cu. As `cllm_gpu.reference.symmetry`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.errors import UserError
from cllm_gpu.fused.launcher import Launcher, Shapes, Variant, blocks_for, element_strides, storage_of
from cllm_gpu.lattice import ELEMENTS

THREADS = 256


def symmetry_forward(launcher: Launcher, x: Any, elements: Any, cosine: Any, sine: Any, sign: Any) -> None:
    """Apply S(e) to x (B, T, H, D), any strides with the last axis contiguous, in place.

    elements (B, T) int32 in 0 … 23; cosine and sine (24, P), sign (24,) float32, 2·P at most D.
    """
    _launch("symmetry_forward", launcher, "x", x, elements, (cosine, sine, sign), transposed=False)


def symmetry_backward(launcher: Launcher, dx: Any, elements: Any, cosine: Any, sine: Any, sign: Any) -> None:
    """Apply S(e)ᵀ to the gradient dx (B, T, H, D) in place."""
    _launch("symmetry_backward", launcher, "dx", dx, elements, (cosine, sine, sign), transposed=True)


def _launch(
    operation: str, launcher: Launcher, name: str, x: Any, elements: Any, tables: Any, *, transposed: bool
) -> None:
    check = Shapes(operation, E=ELEMENTS)
    batch, length, heads, size = check(name, x, "B T H D")
    check("elements", elements, "B T")
    _, pairs = check("cosine", tables[0], "E P")
    check("sine", tables[1], "E P")
    check("sign", tables[2], "E")
    if 2 * pairs > size:
        raise UserError(
            f"{operation}: argument cosine has {pairs} pairs; {name} has head size {size}, at most {size // 2} pairs"
        )
    batch_stride, row_stride, head_stride = element_strides(operation, name, x)
    count = batch * length * heads * pairs
    launcher.launch(
        Variant("symmetry.cu", storage_of(operation, name, x)),
        "symmetry",
        (blocks_for(count, THREADS),),
        THREADS,
        {
            "x": x,
            "elements": elements,
            "cosine": tables[0],
            "sine": tables[1],
            "sign": tables[2],
            "batch_stride": batch_stride,
            "row_stride": row_stride,
            "head_stride": head_stride,
            "count": count,
            "length": length,
            "heads": heads,
            "pairs": pairs,
            "transposed": int(transposed),
        },
        strided=frozenset({"x"}),
    )
