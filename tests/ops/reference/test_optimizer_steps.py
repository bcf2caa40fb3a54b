"""adam_step and sgd_step against the formulas written out for one number at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cllm_gpu.ops.reference.adam import adam_step
from cllm_gpu.ops.reference.sgd import sgd_step
from cllm_gpu.ops.reference.tiling import CPU_TILE_ELEMENTS

SIZES = [(1, 0), (1, 1), (7, 3), (2 * CPU_TILE_ELEMENTS + 5, CPU_TILE_ELEMENTS + 2)]  # elements, decayed
ADAM = {"rate": 0.01, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.1}
STEPS = 3


def adam_by_the_book(p, gradients, *, decay, decoupled, scale):
    m = v = moved = 0.0
    for t, g in enumerate(gradients, start=1):
        g = scale * g + (0.0 if decoupled else decay * p)
        m = ADAM["beta1"] * m + (1 - ADAM["beta1"]) * g
        v = ADAM["beta2"] * v + (1 - ADAM["beta2"]) * g * g
        m_hat, v_hat = m / (1 - ADAM["beta1"] ** t), v / (1 - ADAM["beta2"] ** t)
        moved = ADAM["rate"] * (m_hat / (math.sqrt(v_hat) + ADAM["epsilon"]) + (decay * p if decoupled else 0.0))
        p -= moved
    return p, moved


def sgd_by_the_book(p, gradients, *, decay, momentum, scale):
    u = moved = 0.0
    for g in gradients:
        u = momentum * u + scale * g + decay * p
        moved = 0.01 * u
        p -= moved
    return p, moved


def compare(p, squared, expected, dtype):
    """Each element after a few steps, each a handful of roundings of numbers near 1."""
    tolerance = 40 * float(np.finfo(dtype).eps)
    chosen = np.linspace(0, p.size - 1, min(p.size, 500)).astype(int)
    results = [expected(i) for i in chosen]
    np.testing.assert_allclose(p[chosen], [value for value, _ in results], rtol=0, atol=tolerance)
    if p.size <= 500:
        assert squared == pytest.approx(math.fsum(moved**2 for _, moved in results), rel=tolerance * 10)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("size", "decayed"), SIZES)
def test_adam(size, decayed, decoupled, dtype, generator):
    start = generator.standard_normal(size).astype(dtype)
    gradients = generator.standard_normal((STEPS, size)).astype(dtype)
    p, m, v = start.copy(), np.zeros(size, dtype), np.zeros(size, dtype)
    before = gradients.copy()
    for t in range(STEPS):
        squared = adam_step(
            np, p, gradients[t], m, v, **ADAM, step=t + 1, decayed=decayed, decoupled=decoupled, gradient_scale=0.5
        )
    np.testing.assert_array_equal(gradients, before)

    def expected(i):
        decay = ADAM["weight_decay"] if i < decayed else 0.0
        return adam_by_the_book(
            float(start[i]), map(float, gradients[:, i]), decay=decay, decoupled=decoupled, scale=0.5
        )

    compare(p, squared, expected, dtype)
    assert p.dtype == m.dtype == v.dtype == dtype


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("size", "decayed"), SIZES)
def test_sgd(size, decayed, momentum, dtype, generator):
    start = generator.standard_normal(size).astype(dtype)
    gradients = generator.standard_normal((STEPS, size)).astype(dtype)
    p, u = start.copy(), np.zeros(size, dtype) if momentum else None
    before = gradients.copy()
    for t in range(STEPS):
        squared = sgd_step(
            np, p, gradients[t], u, rate=0.01, momentum=momentum, weight_decay=0.1, decayed=decayed, gradient_scale=0.5
        )
    np.testing.assert_array_equal(gradients, before)

    def expected(i):
        decay = 0.1 if i < decayed else 0.0
        return sgd_by_the_book(float(start[i]), map(float, gradients[:, i]), decay=decay, momentum=momentum, scale=0.5)

    compare(p, squared, expected, dtype)


def test_adam_is_stable_from_the_smallest_to_the_largest_gradients():
    """g² below float32's range leaves ε alone in the denominator; the first update never exceeds the rate by much."""
    gradients = np.array([0.0, 1e-30, -1e-8, 1e-3, 1e3, -1e18], np.float32)
    p, m, v = (np.zeros(gradients.size, np.float32) for _ in range(3))
    adam_step(
        np, p, gradients, m, v, rate=0.1, beta1=0.9, beta2=0.999, epsilon=1e-8, step=1, weight_decay=0.0, decayed=0,
        decoupled=True, gradient_scale=1.0,
    )  # fmt: skip
    # |g|/(|g| + ε)·rate with the sign turned; √v̂ of a subnormal v has few bits: 1e-8 squared is 1e-16, well above
    g = gradients.astype(np.float64)
    np.testing.assert_allclose(p, -0.1 * g / (np.abs(g) + 1e-8), rtol=1e-5, atol=1e-20)
