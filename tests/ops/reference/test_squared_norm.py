"""Sum of squares: exactness in float64, no overflow of float32, non-finite values come through."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cllm_gpu.ops.reference.squared_norm import squared_norm
from cllm_gpu.ops.reference.tiling import CPU_TILE_ELEMENTS


def test_is_exact_to_float64_rounding(generator):
    x = generator.standard_normal(3 * CPU_TILE_ELEMENTS + 17).astype(np.float32)
    exact = math.fsum(float(v) ** 2 for v in x)
    # pairwise sums of positive numbers: relative error about log2(n)·eps
    assert squared_norm(np, x) == pytest.approx(exact, rel=20 * 2.2e-16)


def test_squares_that_float32_cannot_hold():
    assert squared_norm(np, np.array([1e30, 1e-30], np.float32)) == pytest.approx(1e60, rel=1e-6)
    assert squared_norm(np, np.full(4, 1e-30, np.float32)) == pytest.approx(4e-60, rel=1e-6)


@pytest.mark.parametrize(("bad", "check"), [(np.nan, math.isnan), (np.inf, math.isinf), (-np.inf, math.isinf)])
@pytest.mark.parametrize("place", [0, CPU_TILE_ELEMENTS, 2 * CPU_TILE_ELEMENTS])
def test_a_non_finite_element_shows_wherever_it_stands(bad, check, place):
    x = np.ones(2 * CPU_TILE_ELEMENTS + 1, np.float32)
    x[place] = bad
    assert check(squared_norm(np, x))


def test_nothing():
    assert squared_norm(np, np.empty(0, np.float32)) == 0.0
