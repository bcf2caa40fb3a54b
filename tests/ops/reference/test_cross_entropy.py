"""Cross-entropy: finite differences, ignored targets, stability, agreement with known values, float32."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cllm_gpu.ops.reference.cross_entropy import cross_entropy
from cllm_gpu.ops.reference.tiling import CPU_TILE_ELEMENTS

IGNORE = -1
EPS32 = float(np.finfo(np.float32).eps)


def run(x, targets, scale):
    """losses and what the logits' buffer holds afterwards."""
    logits, losses = x.copy(), np.full(x.shape[0], np.nan, x.dtype)
    cross_entropy(np, logits, targets, losses, ignore_index=IGNORE, gradient_scale=scale)
    return losses, logits


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 11), (3, CPU_TILE_ELEMENTS // 2 + 3)])
def test_gradient_is_the_derivative(shape, generator, gradient_error, within):
    x = 2 * generator.standard_normal(shape)
    targets = generator.integers(shape[1], size=shape[0], dtype=np.int32)
    targets[shape[0] // 2 :: 3] = IGNORE if shape[0] > 1 else targets[0]
    _, dx = run(x, targets, 0.37)
    within(f"dx {shape}", gradient_error(lambda: 0.37 * float(run(x, targets, None)[0].sum()), x, dx), 1e-7)


def test_losses_are_minus_the_log_probability_and_logits_stay_without_a_scale(generator):
    x, targets = generator.standard_normal((4, 6)), np.array([5, 0, 3, 3], np.int32)
    losses, after = run(x, targets, None)
    np.testing.assert_array_equal(after, x)
    for row, target, loss in zip(x, targets, losses, strict=True):
        assert loss == pytest.approx(math.log(math.fsum(math.exp(v) for v in row)) - row[target], rel=1e-14)
    np.testing.assert_array_equal(run(x, targets, 1.0)[0], losses)


def test_uniform_logits_cost_log_v():
    losses, dx = run(np.full((2, 256), 7.0), np.array([0, 255], np.int32), 1.0)
    np.testing.assert_allclose(losses, math.log(256), rtol=1e-15)
    assert dx[0, 0] == pytest.approx(1 / 256 - 1)
    assert dx[0, 1] == pytest.approx(1 / 256)


def test_ignored_rows_cost_nothing_and_get_no_gradient(generator):
    x = generator.standard_normal((3, 5))
    losses, dx = run(x, np.array([IGNORE, 2, IGNORE], np.int32), 1.0)
    np.testing.assert_array_equal(losses[[0, 2]], 0)
    np.testing.assert_array_equal(dx[[0, 2]], 0)
    np.testing.assert_array_equal(dx[1], run(x[1:2], np.array([2], np.int32), 1.0)[1][0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_of_ten_thousand_do_not_overflow(dtype):
    x = np.array([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], dtype)
    losses, dx = run(x, np.array([0, 1, 2], np.int32), 1.0)
    np.testing.assert_allclose(losses, [0.0, 2e4, math.log(3)], rtol=1e-6)
    np.testing.assert_allclose(dx, [[0, 0, 0], [1, -1, 0], [1 / 3, 1 / 3, -2 / 3]], atol=1e-6)


def test_gradient_rows_sum_to_zero(generator):
    _, dx = run(generator.standard_normal((9, 301)), generator.integers(301, size=9, dtype=np.int32), 1.0)
    np.testing.assert_allclose(dx.sum(axis=1), 0, atol=301 * 2.2e-16)


def test_float32_is_within_rounding_of_float64(generator, within):
    """exp of a difference d has relative error (|d| + 1)·eps; the sum of V of them V/8·eps; then log and division."""
    x, targets = (
        (3 * generator.standard_normal((20, 999))).astype(np.float32),
        generator.integers(999, size=20, dtype=np.int32),
    )
    single, exact = run(x, targets, 1.0), run(x.astype(np.float64), targets, 1.0)
    relative = (float(np.ptp(x)) + 999 / 8 + 5) * EPS32
    within("losses", float(np.max(np.abs(single[0] - exact[0]))), relative * float(exact[0].max()))
    within("gradient", float(np.max(np.abs(single[1] - exact[1]))), relative)
