"""Σ x² in float64: launches cuda/adam.cu's squared_norm. As `cllm_gpu.ops.reference.squared_norm`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes, blocks_for, storage_of
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.variant import Variant

THREADS = 256
ELEMENTS_PER_THREAD = 4
MAXIMUM_BLOCKS = 1024


def flat_blocks(size: int) -> int:
    """Number of blocks for a flat buffer; the same on every device, so that sums have the same bits."""
    return min(MAXIMUM_BLOCKS, blocks_for(size, THREADS * ELEMENTS_PER_THREAD))


def squared_norm(launcher: Launcher, x: Any) -> float:
    """As the reference; synchronizes with the device."""
    if x.size == 0:
        return 0.0
    return float(squared_norm_on_device(launcher, x)[0])


def squared_norm_on_device(launcher: Launcher, x: Any, *, total: Any | None = None) -> Any:
    """Σ x² as a float64 device array (1,), without synchronization; `total` if that is given."""
    Shapes("squared_norm")("x", x, "n")
    storage = storage_of("squared_norm", "x", x)
    blocks = max(1, flat_blocks(x.size))
    partials = launcher.scratch("squares", (blocks,), "float64")
    variant = Variant("adam.cu", storage)
    launcher.launch(variant, "squared_norm", (blocks,), THREADS, {"x": x, "partials": partials, "size": x.size})
    return finish_sum(launcher, storage, partials, total)


def finish_sum(launcher: Launcher, storage: str, partials: Any, total: Any | None = None) -> Any:
    """Σ partials (blocks,) float64 in a fixed order, in `total` (1,), or in scratch memory that later sums reuse."""
    if total is None:
        total = launcher.scratch("total", (1,), "float64")
    arguments = {"partials": partials, "total": total, "count": partials.size}
    launcher.launch(Variant("adam.cu", storage), "sum_finish", (1,), THREADS, arguments)
    return total
