"""Softmax cross-entropy and its gradient in the logits' buffer: launches cuda/cross_entropy.cu.

As `cllm_gpu.ops.reference.cross_entropy`; losses are always float32.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes, blocks_for, storage_of
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.variant import Variant

MAXIMUM_THREADS = 1024


def cross_entropy(
    launcher: Launcher, logits: Any, targets: Any, losses: Any, *, ignore_index: int, gradient_scale: float | None
) -> None:
    """As the reference; losses float32."""
    check = Shapes("cross_entropy")
    rows, columns = check("logits", logits, "N V")
    check("targets", targets, "N")
    check("losses", losses, "N")
    packs = blocks_for(columns, 16 // logits.dtype.itemsize)
    threads = min(MAXIMUM_THREADS, 32 * blocks_for(packs, 32))
    launcher.launch(
        Variant("cross_entropy.cu", storage_of("cross_entropy", "logits", logits)),
        "cross_entropy",
        (rows,),
        threads,
        {
            "logits": logits,
            "targets": targets,
            "losses": losses,
            "columns": columns,
            "ignore_index": ignore_index,
            "write_gradient": int(gradient_scale is not None),
            "gradient_scale": gradient_scale or 0.0,
        },
    )
