"""The next token from logits: temperature, top-k and top-p ("nucleus", Holtzman et al. 2020), on the host in float64.

The order is temperature, then top-k, then top-p over what top-k left. A draw is one uniform number against the
cumulative probabilities, so a seed decides the whole text.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_gpu.utils.errors import UserError


class Sampler:
    """Picks token ids; its draws are a pure function of the seed and of the logits it is shown."""

    def __init__(self, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 1) -> None:
        """temperature 0 is greedy; top_k 0 and top_p 1 are off. UserError for values with no meaning."""
        if not (math.isfinite(temperature) and temperature >= 0):
            raise UserError(f"temperature is {temperature}; it must be a finite number, at least 0 (0: greedy)")
        if top_k < 0:
            raise UserError(f"top-k is {top_k}; it must be at least 0 (0: off)")
        if not 0 < top_p <= 1:
            raise UserError(f"top-p is {top_p}; it must be above 0 and at most 1 (1: off)")
        if seed < 0:
            raise UserError(f"seed is {seed}; it must be at least 0")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def pick(self, logits: npt.NDArray[Any]) -> int:
        """A token id from logits (V,). UserError when they hold a NaN or no finite maximum."""
        x = checked_logits(logits)
        if self.temperature == 0:
            return int(x.argmax())
        cumulative = self._probabilities(x).cumsum()
        drawn = self._generator.random() * cumulative[-1]  # below cumulative[-1], save for rounding
        index = int(np.searchsorted(cumulative, drawn, side="right"))  # first whose cumulative is above: never p = 0
        return min(index, int(np.searchsorted(cumulative, cumulative[-1])))

    def probabilities(self, logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """What `pick` draws from, (V,) with sum 1; for greedy, 1 at the likeliest token (the lowest id of equals)."""
        x = checked_logits(logits)
        if self.temperature == 0:
            return (np.arange(x.size) == x.argmax()).astype(np.float64)
        return self._probabilities(x)

    def _probabilities(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        with np.errstate(over="ignore", under="ignore"):  # a tiny temperature: -inf, then probability 0
            p = np.exp((x - x.max()) / self.temperature)
        p /= p.sum()
        if 0 < self.top_k < p.size or self.top_p < 1:
            order = np.argsort(-x, kind="stable")  # of equal logits the lower id comes first
            kept = order[: self.top_k or p.size]
            if self.top_p < 1:
                cumulative = p[kept].cumsum()
                kept = kept[: int(np.searchsorted(cumulative, self.top_p * cumulative[-1])) + 1]
            chosen = np.zeros_like(p)
            chosen[kept] = p[kept] / p[kept].sum()
            return chosen
        return p


def checked_logits(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """`logits` (V,) in float64. UserError when no token can be chosen from them."""
    x = np.asarray(logits, dtype=np.float64)
    if not (x.ndim == 1 and x.size and np.isfinite(x.max())):  # max is NaN when any is
        raise UserError("the model's logits are not finite; its weights cannot generate text")
    return x
