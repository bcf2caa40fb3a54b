"""How an optimizer's step writes weights that are held in bfloat16: with float32 masters, or alone.

With masters the step is in float32 and the bfloat16 copy is their nearest. Alone, nearest rounding would lose every
update below half a unit in the last place (adding 1e-4 to 1 a thousand times leaves 1), so the sum is rounded up or
down at random with the odds that make the mean exact: 16 random bits are added below the last place kept, and what is
below is cut off. The bits are Philox words indexed by element and step, so every backend draws the same.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cllm_gpu.ops.precision import wide_dtype
from cllm_gpu.ops.reference.philox import random_words

SITE = 0xFFFFFFFF
"""Last word of the Philox counter: dropout's sites count from 0."""


@dataclass(frozen=True)
class StochasticRounding:
    """Which random bits: a pure function of (seed, step, element index)."""

    seed: int
    """64-bit key of the run."""
    step: Any
    """Updates before this one, an int; for CUDA kernels also (1,) uint32 on the device."""
    first_element: int = 0
    """Index of the array's first element in the whole flat buffer (an array may be a part of it)."""

    def after(self, elements: int) -> StochasticRounding:
        """The rounding of what begins `elements` further on."""
        return dataclasses.replace(self, first_element=self.first_element + elements)

    def round(self, xp: Any, x: Any, start: int) -> Any:
        """x (n,) float32, contiguous, elements `start` … of the array, as float32 numbers that bfloat16 holds."""
        words = random_words(
            xp, self.first_element + start, x.size, seed=self.seed, stream=(self.step & 0xFFFFFFFF, SITE)
        )
        bits = x.view(xp.uint32) + (words & xp.uint32(0xFFFF))
        bits &= xp.uint32(0xFFFF0000)
        return xp.where(xp.isnan(x), x, bits.view(xp.float32))


def widened(x: Any) -> Any:
    """x itself, or in float32 where it is narrower."""
    return x.astype(wide_dtype(x.dtype), copy=False)


def subtract(
    xp: Any, parameters: Any, copy: Any | None, part: slice, update: Any, rounding: StochasticRounding | None
) -> None:
    """parameters[part] −= update, rounded as `rounding` says; copy[part], unless None, is its nearest."""
    if rounding is None:
        parameters[part] -= update
    else:
        parameters[part] = rounding.round(xp, widened(parameters[part]) - update, part.start)
    if copy is not None:
        copy[part] = parameters[part]
