"""GELU with the bias before it: the formula, finite differences, aliasing, extremes, float32 against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cllm_gpu.ops.reference.gelu import gelu_backward, gelu_forward
from cllm_gpu.ops.reference.tiling import CPU_TILE_ELEMENTS

SHAPES = [(1, 1), (7, 5), (3, CPU_TILE_ELEMENTS // 2 + 1)]  # the last takes three tiles
EPS32 = float(np.finfo(np.float32).eps)


def run(x, bias, dout, *, accumulate=False, start=0.0):
    """out, h, dx (written over dout's copy, as the model does), dbias."""
    h, out = x.copy(), np.full_like(x, np.nan)
    gelu_forward(np, h, bias, out)
    dx, dbias = dout.copy(), np.full_like(bias, start)
    gelu_backward(np, dx, h, dx, dbias, accumulate=accumulate)
    return out, h, dx, dbias


def test_values_are_those_of_the_published_formula():
    x = np.linspace(-6.0, 6.0, 49).reshape(7, 7)
    out, *_ = run(x, np.zeros(7), np.ones_like(x))
    expected = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.flat]
    # 1 + tanh(u) cancels near u = −6: absolute error of a few eps times |x|
    np.testing.assert_allclose(out.ravel(), expected, rtol=0, atol=6 * 4 * 2.2e-16)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_the_derivative(shape, generator, gradient_error, within):
    x, dout = 2 * generator.standard_normal(shape), generator.standard_normal(shape)
    bias = generator.standard_normal(shape[1])
    *_, dx, dbias = run(x, bias, dout, start=np.nan)

    def f():
        return float(np.sum(run(x, bias, dout)[0] * dout))

    within(f"dx {shape}", gradient_error(f, x, dx), 1e-7)
    within(f"dbias {shape}", gradient_error(f, bias, dbias), 1e-7)


def test_bias_is_added_in_place_and_its_gradient_accumulates(generator):
    x, dout, bias = generator.standard_normal((5, 3)), generator.standard_normal((5, 3)), generator.standard_normal(3)
    _, h, dx, dbias = run(x, bias, dout)
    np.testing.assert_array_equal(h, x + bias)
    np.testing.assert_allclose(dbias, dx.sum(axis=0), rtol=1e-14)
    np.testing.assert_allclose(run(x, bias, dout, accumulate=True, start=3.0)[3], dbias + 3.0, atol=1e-14)
    separate = np.full_like(dx, np.nan)
    gelu_backward(np, dout, h, separate, None, accumulate=False)
    np.testing.assert_array_equal(separate, dx)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_inputs_are_identity_or_zero(dtype):
    """h² stays finite up to 1e4; beyond any activation of a model."""
    x = np.array([[-1e4, -50.0, 50.0, 1e4]], dtype)
    out, _, dx, _ = run(x, np.zeros(4, dtype), np.ones_like(x))
    np.testing.assert_array_equal(np.abs(out), [[0, 0, 50, 1e4]])
    np.testing.assert_array_equal(dx, [[0, 0, 1, 1]])


def test_float32_is_within_rounding_of_float64(generator, within):
    """gelu has slope and curvature of order 1; about ten roundings of numbers up to 1 + |x|."""
    x, dout = (3 * generator.standard_normal((64, 50))).astype(np.float32), np.ones((64, 50), np.float32)
    bias = generator.standard_normal(50).astype(np.float32)
    single = run(x, bias, dout)
    exact = run(*(v.astype(np.float64) for v in (x, bias, dout)))
    size = 1 + np.abs(exact[1])
    within("out", float(np.max(np.abs(single[0] - exact[0]) / size)), 10 * EPS32)
    within("dx", float(np.max(np.abs(single[2] - exact[2]) / size)), 10 * EPS32)
