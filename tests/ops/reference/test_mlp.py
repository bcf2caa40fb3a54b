"""The MLP: finite differences, accumulation, float32 against float64, and what is kept."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.ops.reference.gelu import gelu_forward
from cllm_gpu.ops.reference.mlp import mlp_backward, mlp_forward

SHAPES = [(1, 1, 1), (5, 3, 7), (13, 9, 24)]  # N, C, M
PARAMETERS = ("up_weight", "up_bias", "down_weight", "down_bias")
EPS32 = float(np.finfo(np.float32).eps)


def draw(generator, n, c, m, dtype=np.float64):
    shapes = {"x": (n, c), "up_weight": (m, c), "up_bias": (m,), "down_weight": (c, m), "down_bias": (c,)}
    shapes["dout"] = (n, c)
    return {name: generator.standard_normal(shape).astype(np.float32).astype(dtype) for name, shape in shapes.items()}


def forward(a):
    """hidden, activated, out."""
    (n, c), m, dtype = a["x"].shape, a["up_weight"].shape[0], a["x"].dtype
    results = [np.full(shape, np.nan, dtype) for shape in ((n, m), (n, m), (n, c))]
    mlp_forward(np, a["x"], *(a[name] for name in PARAMETERS), *results)
    return results


def backward(a, *, accumulate=False, start=np.nan):
    """dhidden, dx and the gradients of the parameters."""
    hidden, activated, _ = forward(a)
    activations = [np.full(shape, np.nan, hidden.dtype) for shape in (hidden.shape, a["x"].shape)]
    gradients = [np.full(a[name].shape, start, hidden.dtype) for name in PARAMETERS]
    weights = a["up_weight"], a["down_weight"]
    mlp_backward(np, a["dout"], a["x"], hidden, activated, *weights, *activations, *gradients, accumulate=accumulate)
    return [*activations, *gradients]


@pytest.mark.parametrize(("n", "c", "m"), SHAPES)
def test_backward_is_the_derivative(n, c, m, generator, gradient_error, within):
    a = draw(generator, n, c, m)

    def f():
        return float(np.sum(forward(a)[2] * a["dout"]))

    _, dx, *gradients = backward(a)
    for name, gradient in zip(("x", *PARAMETERS), (dx, *gradients), strict=True):
        within(f"d{name} {n, c, m}", gradient_error(f, a[name], gradient), 1e-7)


def test_what_is_kept(generator):
    """hidden holds the bias, and activated is gelu of it."""
    a = draw(generator, 6, 5, 4)
    hidden, activated, out = forward(a)
    np.testing.assert_allclose(hidden, a["x"] @ a["up_weight"].T + a["up_bias"], atol=1e-14)
    want = np.empty_like(hidden)
    gelu_forward(np, hidden, None, want)
    np.testing.assert_array_equal(activated, want)
    np.testing.assert_allclose(out, activated @ a["down_weight"].T + a["down_bias"], atol=1e-14)


def test_parameter_gradients_accumulate_and_activation_gradients_do_not(generator):
    a = draw(generator, 6, 5, 4)
    once, again = backward(a), backward(a, accumulate=True, start=2.0)
    for name, first, second in zip(("dhidden", "dx", *PARAMETERS), once, again, strict=True):
        want = first + 2.0 * (name in PARAMETERS)
        np.testing.assert_allclose(second, want, atol=1e-13, err_msg=name)


@pytest.mark.parametrize(("n", "c", "m"), SHAPES)
def test_float32_against_float64(n, c, m, generator, within):
    a = draw(generator, n, c, m)
    small = {name: x.astype(np.float32) for name, x in a.items()}
    for ours, exact in zip((*forward(small), *backward(small)), (*forward(a), *backward(a)), strict=True):
        # sums of at most c + m + n terms, one after another
        largest = max(1.0, float(np.abs(exact).max()))
        within(f"{n, c, m}", float(np.abs(ours - exact).max()), (30 + n + c + m) * EPS32 * largest)
