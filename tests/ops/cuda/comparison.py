"""Bounds of the comparisons of fused operations with the reference in float64.

float32: `factor`·eps·(largest value): the operation's growth times one rounding.
bfloat16: one rounding of the exact result (half an ulp, at most 2^-8 relative) plus the float32 bound.
Inputs are the same bf16 numbers on both sides.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.ops.reference.philox import random_words

EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7}


def close(name: str, got: Any, want: Any, *, storage: str, factor: float, least: float = 0.0) -> None:
    """Fails unless |got − want| ≤ factor·eps(float32)·max(max|want|, least) (+ half an ulp of bf16·|want|)."""
    got64, want64 = np.asarray(got).astype(np.float64), np.asarray(want).astype(np.float64)
    assert got64.shape == want64.shape, f"{name}: shape {got64.shape}, expected {want64.shape}"
    if want64.size == 0:
        return
    bound = factor * EPSILON["float32"] * max(least, float(np.abs(want64).max()))
    allowed = bound + (0.5 * EPSILON["bfloat16"] * np.abs(want64) * 1.01 if storage == "bfloat16" else 0.0)
    error = np.abs(got64 - want64)
    worst = float(np.max(error - allowed))
    print(f"{name} {storage}: largest error {error.max():.3g}, float32 part of the bound {bound:.3g}")
    assert worst <= 0.0, f"{name} ({storage}): error {error.max():.3g} passes its bound by {worst:.3g}"


def tied_dropout(*, seed: int, step: int, site: int, first_element: int) -> Dropout:
    """A mask whose first element's word is the threshold itself: kept, but only just."""
    word = random_words(np, first_element, 1, seed=seed, stream=(step, site))[0]
    return Dropout(int(word) / 2.0**32, seed=seed, step=step, site=site, first_element=first_element)
