"""Linear: finite differences, accumulation, float32 against float64."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.ops.reference.linear import linear_backward, linear_forward

SHAPES = [(1, 1, 1), (1, 7, 3), (13, 5, 9), (37, 64, 33)]  # N, K, M
EPS32 = float(np.finfo(np.float32).eps)


def draw(generator, n, k, m, dtype=np.float64):
    shapes = {"x": (n, k), "weight": (m, k), "bias": (m,), "dout": (n, m)}
    return {name: generator.standard_normal(shape).astype(np.float32).astype(dtype) for name, shape in shapes.items()}


def backward(a, *, accumulate=False, start=0.0):
    dtype = a["x"].dtype
    gradients = [np.full(a[name].shape, start, dtype) for name in ("x", "weight", "bias")]
    linear_backward(np, a["dout"], a["x"], a["weight"], *gradients, accumulate=accumulate)
    return gradients


@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
def test_backward_is_the_derivative(n, k, m, generator, gradient_error, within):
    a = draw(generator, n, k, m)

    def f():
        out = np.full((n, m), np.nan)
        linear_forward(np, a["x"], a["weight"], a["bias"], out)
        return float(np.sum(out * a["dout"]))

    for name, gradient in zip(("x", "weight", "bias"), backward(a, start=np.nan), strict=True):
        within(f"d{name} {n, k, m}", gradient_error(f, a[name], gradient), 1e-7)


def test_parameter_gradients_accumulate_and_activation_gradients_do_not(generator):
    a = draw(generator, 6, 5, 4)
    dx, dweight, dbias = backward(a)
    again = backward(a, accumulate=True, start=2.0)
    np.testing.assert_array_equal(again[0], dx)
    # 2 + g in another order than g alone: one rounding of numbers up to about 10
    np.testing.assert_allclose(again[1], dweight + 2.0, atol=1e-14)
    np.testing.assert_allclose(again[2], dbias + 2.0, atol=1e-14)


def test_parts_without_bias_or_input_gradient(generator):
    a = draw(generator, 6, 5, 4)
    out, with_bias = np.empty((6, 4)), np.empty((6, 4))
    linear_forward(np, a["x"], a["weight"], None, out)
    linear_forward(np, a["x"], a["weight"], a["bias"], with_bias)
    np.testing.assert_array_equal(out + a["bias"], with_bias)
    dweight = np.empty((4, 5))
    linear_backward(np, a["dout"], a["x"], a["weight"], None, dweight, None, accumulate=False)
    np.testing.assert_array_equal(dweight, backward(a)[1])


@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
def test_float32_is_within_rounding_of_float64(n, k, m, generator, within):
    """A dot product of length K in any order: |error| ≤ K·eps·Σ|x||w| (Higham 2002, 3.5), elementwise."""
    exact, single = draw(generator, n, k, m), {}
    single = {name: value.astype(np.float32) for name, value in exact.items()}
    outs = {dtype: np.empty((n, m), dtype) for dtype in (np.float64, np.float32)}
    linear_forward(np, exact["x"], exact["weight"], exact["bias"], outs[np.float64])
    linear_forward(np, single["x"], single["weight"], single["bias"], outs[np.float32])
    size = np.abs(exact["x"]) @ np.abs(exact["weight"]).T + np.abs(exact["bias"])
    within("out", float(np.max(np.abs(outs[np.float32] - outs[np.float64]) / size)), (k + 1) * EPS32)
    growth = {
        "dx": (m, np.abs(exact["dout"]) @ np.abs(exact["weight"])),
        "dweight": (n, np.abs(exact["dout"]).T @ np.abs(exact["x"])),
        "dbias": (n, np.abs(exact["dout"]).sum(axis=0)),
    }
    for (name, (terms, size)), e, s in zip(growth.items(), backward(exact), backward(single), strict=True):
        assert s.dtype == np.float32
        within(name, float(np.max(np.abs(s - e) / size)), terms * EPS32)
