"""Inverted dropout with a Philox mask: launches cuda/dropout.cu. As `cllm_gpu.reference.dropout`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.errors import UserError
from cllm_gpu.fused.launcher import Launcher, Variant, blocks_for, storage_of
from cllm_gpu.reference.dropout import Dropout

THREADS = 256
WORDS = 4  # elements of one Philox evaluation, and of one thread


def mask_arguments(launcher: Launcher, dropout: Dropout | None) -> dict[str, Any]:
    """The mask as kernels take it; None keeps everything. A step that is a number is copied to the device first."""
    if dropout is None:
        return {"first_element": 0, "seed": 0, "step": None, "site": 0, "threshold": 0, "scale": 1.0}
    return {
        "first_element": dropout.first_element,
        "seed": dropout.seed,
        "step": draw_number(launcher, dropout.step),
        "site": dropout.site & 0xFFFFFFFF,
        "threshold": dropout.threshold,
        "scale": dropout.scale,
    }


def draw_number(launcher: Launcher, step: Any) -> Any:
    """A Philox step as kernels take it, (1,) uint32 on the device; a number's lowest 32 bits."""
    return launcher.on_device("draw", step & 0xFFFFFFFF if isinstance(step, int) else step, "uint32")


def dropout_forward(launcher: Launcher, x: Any, out: Any, *, dropout: Dropout) -> None:
    """out = x·mask/(1 − rate), both contiguous and of one shape; `out` may be `x`."""
    _launch("dropout_forward", launcher, "x", x, "out", out, dropout)


def dropout_backward(launcher: Launcher, dout: Any, dx: Any, *, dropout: Dropout) -> None:
    """dx = dout·mask/(1 − rate); `dx` may be `dout`."""
    _launch("dropout_backward", launcher, "dout", dout, "dx", dx, dropout)


def _launch(operation: str, launcher: Launcher, name: str, x: Any, out_name: str, out: Any, dropout: Dropout) -> None:
    if x.shape != out.shape:
        raise UserError(f"{operation}: argument {out_name} has shape {out.shape}; it must be {name}'s, {x.shape}")
    groups = blocks_for(x.size + dropout.first_element % WORDS, WORDS)
    launcher.launch(
        Variant("dropout.cu", storage_of(operation, name, x)),
        "dropout",
        (blocks_for(groups, THREADS),),
        THREADS,
        {"x": x, "out": out, "size": x.size, **mask_arguments(launcher, dropout)},
    )
