"""Rounding of an optimizer step's bfloat16 weights: with float32 master weights, or without.

With master weights the step is in float32, and the bfloat16 copy is the masters rounded to nearest. Without them,
rounding to nearest would lose every update below half a unit in the last place (adding 1e-4 to 1 a thousand times
leaves 1). So rounding is stochastic, up or down with the probabilities that make the mean exact: 16 random bits are
added below the last place kept, and the result is truncated. The bits are Philox words indexed by element and step, so
every backend draws the same ones.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cllm_gpu.ops.precision import wide_dtype
from cllm_gpu.ops.reference.philox import random_words

SITE = 0xFFFFFFFF
"""Last word of the Philox counter; dropout sites count from 0."""


@dataclass(frozen=True)
class StochasticRounding:
    """Identifies the random bits, a pure function of (seed, step, element index)."""

    seed: int
    """64-bit key of the run."""
    step: Any
    """Number of updates before this one, an int; for CUDA kernels also (1,) uint32 on the device."""
    first_element: int = 0
    """Index of the array's first element in the whole flat buffer, if the array is a part of it."""

    def after(self, elements: int) -> StochasticRounding:
        """The rounding of the slice that begins `elements` later."""
        return dataclasses.replace(self, first_element=self.first_element + elements)

    def round(self, xp: Any, x: Any, start: int) -> Any:
        """x (n,) float32, contiguous, elements `start` … of the array, rounded to bfloat16 values, as float32."""
        words = random_words(
            xp, self.first_element + start, x.size, seed=self.seed, stream=(self.step & 0xFFFFFFFF, SITE)
        )
        bits = x.view(xp.uint32) + (words & xp.uint32(0xFFFF))
        bits &= xp.uint32(0xFFFF0000)
        return xp.where(xp.isnan(x), x, bits.view(xp.float32))


def widened(x: Any) -> Any:
    """x, upcast to float32 if its dtype is narrower."""
    return x.astype(wide_dtype(x.dtype), copy=False)


def subtract(
    xp: Any, parameters: Any, copy: Any | None, part: slice, update: Any, rounding: StochasticRounding | None
) -> None:
    """parameters[part] −= update, rounded by `rounding`; copy[part], unless None, is it rounded to nearest."""
    if rounding is None:
        parameters[part] -= update
    else:
        parameters[part] = rounding.round(xp, widened(parameters[part]) - update, part.start)
    if copy is not None:
        copy[part] = parameters[part]
