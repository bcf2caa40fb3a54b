"""Layer norm, alone and after a residual addition: finite differences, aliasing, statistics, float32."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.ops.reference.layernorm import layernorm_backward, layernorm_forward, residual_layernorm_forward

SHAPES = [(1, 2), (5, 7), (3, 33), (700, 97)]  # the last takes several tiles
EPSILON = 1e-5
EPS32 = float(np.finfo(np.float32).eps)


def draw(generator, shape, dtype=np.float64):
    a = {name: generator.standard_normal(shape) for name in ("x", "branch", "dout", "dresidual")}
    a |= {name: 1 + generator.standard_normal(shape[1]) for name in ("weight", "bias")}
    return {name: value.astype(np.float32).astype(dtype) for name, value in a.items()}


def forward(x, weight, bias):
    out, mean, rstd = np.full_like(x, np.nan), np.empty_like(x[:, 0]), np.empty_like(x[:, 0])
    layernorm_forward(np, x, weight, bias, out, mean, rstd, epsilon=EPSILON)
    return out, mean, rstd


def backward(a, x, *, dresidual=None, in_place=False, accumulate=False, start=np.nan, dbranch=None, dropout=None):
    _, mean, rstd = forward(x, a["weight"], a["bias"])
    dweight, dbias = np.full_like(a["weight"], start), np.full_like(a["bias"], start)
    residual = None if dresidual is None else dresidual.copy()
    dx = residual if in_place else np.full_like(x, np.nan)
    layernorm_backward(
        np, a["dout"], x, a["weight"], mean, rstd, residual, dx, dbranch, dweight, dbias,
        accumulate=accumulate, dropout=dropout,
    )  # fmt: skip
    return dx, dweight, dbias


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_the_derivative(shape, generator, gradient_error, within):
    a = draw(generator, shape)

    def f():
        return float(np.sum(forward(a["x"], a["weight"], a["bias"])[0] * a["dout"]))

    for name, gradient in zip(("x", "weight", "bias"), backward(a, a["x"]), strict=True):
        within(f"d{name} {shape}", gradient_error(f, a[name], gradient), 1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_backward_through_the_residual_addition(shape, rate, generator, gradient_error, within):
    """f = Σ dout·LN(s) + Σ dresidual·s with s = residual + dropout(branch): both roads into the residual stream."""
    a = draw(generator, shape)
    dropout = Dropout(rate, seed=3, step=1, site=2) if rate else None

    def run():
        stream, out = np.full(shape, np.nan), np.full(shape, np.nan)
        mean, rstd = np.empty(shape[0]), np.empty(shape[0])
        residual_layernorm_forward(
            np, a["x"], a["branch"].copy(), a["weight"], a["bias"], stream, out, mean, rstd,
            epsilon=EPSILON, dropout=dropout,
        )  # fmt: skip
        return stream, out

    def f():
        stream, out = run()
        return float(np.sum(out * a["dout"]) + np.sum(stream * a["dresidual"]))

    dbranch = np.full(shape, np.nan) if dropout is not None else None
    dstream, *_ = backward(a, run()[0], dresidual=a["dresidual"], in_place=True, dbranch=dbranch, dropout=dropout)
    dbranch = dstream if dbranch is None else dbranch
    within(f"dresidual {shape}", gradient_error(f, a["x"], dstream), 1e-7)
    within(f"dbranch {shape}", gradient_error(f, a["branch"], dbranch), 1e-7)


def test_the_residual_may_be_written_over(generator):
    a = draw(generator, (5, 7))
    stream, mean, rstd, out = a["x"].copy(), np.empty(5), np.empty(5), np.empty((5, 7))
    residual_layernorm_forward(
        np, stream, a["branch"].copy(), a["weight"], None, stream, out, mean, rstd, epsilon=EPSILON, dropout=None
    )
    np.testing.assert_array_equal(stream, a["x"] + a["branch"])
    np.testing.assert_array_equal(out, forward(stream, a["weight"], None)[0])


def test_gradients_accumulate_and_the_stream_is_added_to(generator):
    a = draw(generator, (9, 6))
    dx, dweight, dbias = backward(a, a["x"])
    added, *_ = backward(a, a["x"], dresidual=a["dresidual"])
    np.testing.assert_array_equal(added, dx + a["dresidual"])
    _, more_weight, more_bias = backward(a, a["x"], accumulate=True, start=2.0)
    np.testing.assert_allclose(more_weight, dweight + 2.0, atol=1e-13)
    np.testing.assert_allclose(more_bias, dbias + 2.0, atol=1e-13)


@pytest.mark.parametrize("place", ["dout", "dx"])
def test_the_branchs_gradient_may_lie_where_another_was(place, generator):
    dropout = Dropout(0.4, seed=3, step=1, site=2)
    a = draw(generator, (700, 97))
    apart, stream = np.full((700, 97), np.nan), a["dresidual"].copy()
    backward(a, a["x"], dresidual=a["dresidual"], dbranch=apart, dropout=dropout)
    _, mean, rstd = forward(a["x"], a["weight"], a["bias"])
    dout = a["dout"].copy()
    dbranch = dout if place == "dout" else stream
    layernorm_backward(
        np, dout, a["x"], a["weight"], mean, rstd, stream, stream, dbranch, np.zeros(97), None,
        accumulate=False, dropout=dropout,
    )  # fmt: skip
    np.testing.assert_array_equal(dbranch, apart)


def test_rows_are_normalised_and_a_constant_row_is_not_divided_by_zero(generator):
    x = np.vstack([generator.standard_normal((4, 50)) * 1e3 + 7e3, np.full((1, 50), 4.0)])
    out, mean, rstd = forward(x, np.ones(50), None)
    np.testing.assert_allclose(out.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(out[:4].var(axis=1), 1, rtol=1e-9)  # epsilon / variance = 1e-11
    np.testing.assert_array_equal(out[4], 0)
    np.testing.assert_allclose(mean, x.mean(axis=1), rtol=1e-14)
    assert rstd[4] == pytest.approx(EPSILON**-0.5)


def test_float32_is_within_rounding_of_float64(generator, within):
    """x̂ has a few roundings and a mean of C terms: (C/8 + 10)·eps·(1 + max|x|·rstd), NumPy adding in 8 lanes."""
    exact = draw(generator, (40, 96))
    single = {name: value.astype(np.float32) for name, value in exact.items()}
    out = {a["x"].dtype.itemsize: forward(a["x"], a["weight"], a["bias"])[0] for a in (exact, single)}
    size = float(np.max(np.abs(out[8]))) + 1
    within("out", float(np.max(np.abs(out[4] - out[8]))) / size, (96 / 8 + 10) * EPS32)
    terms = {"dx": 96 / 8 + 20, "dweight": 40 + 20, "dbias": 40}
    for (name, count), e, s in zip(
        terms.items(), backward(exact, exact["x"]), backward(single, single["x"]), strict=True
    ):
        assert s.dtype == np.float32
        within(name, float(np.linalg.norm(s - e) / np.linalg.norm(e)), count * EPS32)
