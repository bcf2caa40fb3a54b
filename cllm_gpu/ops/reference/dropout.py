"""Inverted dropout: out = x·keep/(1 − rate), the mask drawn from Philox by element index and never stored.

An element is kept when its random word is at least rate·2³². Backward: the same map with the same mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cllm_gpu.ops.reference.philox import random_words
from cllm_gpu.ops.reference.tiling import tile_elements


@dataclass(frozen=True)
class Dropout:
    """Which mask: a pure function of (seed, step, site, element index)."""

    rate: float
    """Probability of dropping an element, 0 ≤ rate < 1."""
    seed: int
    """64-bit key of the run."""
    step: Any
    """Draw number, an int; for CUDA kernels also (1,) uint32 on the device, where a replayed launch finds a new one."""
    site: int
    """Which of the model's dropouts."""
    first_element: int = 0
    """Index of the array's first element in the whole batch (an array may be a part of it)."""

    @property
    def threshold(self) -> int:
        """A word below this drops its element."""
        return round(self.rate * 2.0**32)

    @property
    def scale(self) -> float:
        """What a kept element is multiplied by."""
        return 1.0 / (1.0 - self.rate)


def dropout_forward(xp: Any, x: Any, out: Any, *, dropout: Dropout) -> None:
    """out = x·mask/(1 − rate), both contiguous and of one shape; `out` may be `x`."""
    flat_x, flat_out = x.reshape(-1), out.reshape(-1)
    scale = x.dtype.type(dropout.scale)
    step = tile_elements(xp)
    for start in range(0, x.size, step):
        part = slice(start, min(start + step, x.size))
        words = random_words(
            xp,
            dropout.first_element + start,
            part.stop - start,
            seed=dropout.seed,
            stream=(dropout.step, dropout.site),
        )
        mask = (words >= dropout.threshold).astype(x.dtype)
        mask *= scale
        xp.multiply(flat_x[part], mask, out=flat_out[part])


def dropout_backward(xp: Any, dout: Any, dx: Any, *, dropout: Dropout) -> None:
    """dx = dout·mask/(1 − rate); `dx` may be `dout`."""
    dropout_forward(xp, dout, dx, dropout=dropout)
