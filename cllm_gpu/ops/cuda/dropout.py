"""The mask of `cllm_gpu.ops.reference.dropout` as arguments of the kernels it is fused into (cuda/dropout.cuh)."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.reference.dropout import Dropout


def mask_arguments(launcher: Launcher, dropout: Dropout | None) -> dict[str, Any]:
    """The mask as the field `dropout` of a kernel's struct; None keeps everything.

    A step that is a number is copied to the device first.
    """
    fields: dict[str, Any]
    if dropout is None:
        fields = {"first_element": 0, "seed": 0, "step": None, "site": 0, "threshold": 0, "scale": 1.0}
    else:
        fields = {
            "first_element": dropout.first_element,
            "seed": dropout.seed,
            "step": draw_number(launcher, dropout.step),
            "site": dropout.site & 0xFFFFFFFF,
            "threshold": dropout.threshold,
            "scale": dropout.scale,
        }
    return {f"dropout.{name}": value for name, value in fields.items()}


def draw_number(launcher: Launcher, step: Any) -> Any:
    """A Philox step as a kernel argument, (1,) uint32 on the device; of an int, the lowest 32 bits."""
    return launcher.on_device("draw", step & 0xFFFFFFFF if isinstance(step, int) else step, "uint32")
