"""Native attention with the lattice's score terms against the reference, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from cllm_gpu.model.lattice import lattice_points
from cllm_gpu.ops.native.attention import attention_backward, attention_forward
from cllm_gpu.ops.reference import attention as reference
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients

# B, T queries, S keys, H, K, D, causal, V
CASES = [
    (1, 1, 1, 1, 1, 1, True, 2),  # the window reaches before the sequence at once
    (2, 1, 6, 2, 1, 3, True, 2),
    (2, 1, 37, 2, 2, 8, True, 3),  # a token of generation with a cache
    (2, 7, 7, 3, 3, 5, True, 2),
    (1, 33, 33, 6, 2, 16, True, 3),
    (2, 5, 40, 4, 1, 33, True, 1),  # one token over and over: every match is as long as can be
    (2, 35, 48, 4, 2, 7, False, 2),
    (1, 133, 135, 2, 1, 12, True, 5),
    (1, 300, 301, 1, 1, 20, True, 2),  # several blocks of queries in the backward
]
# distance, prime distance, same token, matches
COMBINATIONS = [
    *((False, False, same, matches) for same in (False, True) for matches in (0, 1, 3, 8) if same or matches),
    *((distance, prime, True, 2) for distance, prime in ((True, False), (False, True), (True, True))),
    (True, False, False, 0),
    (False, True, False, 0),
    (True, True, True, 8),
]


def _arrays(case, generator):
    """q, k, v as views of one wide array, out and lse."""
    b, t, s, h, kv, d, _, _ = case
    wide = generator.standard_normal((b, s, h + 2 * kv, d))
    q, k, v = wide[:, s - t :, :h], wide[:, :, h : h + kv], wide[:, :, h + kv :]
    return [q, k, v, np.zeros((b, t, h, d)), np.zeros((b, h, t))]


def _score_bias(case, combination, generator):
    """Repetitive tokens as a view into a longer cache, their points, and scalars of either sign."""
    b, _, s, h, _, _, _, v = case
    distance, prime, same, matches = combination
    tokens = generator.integers(0, v, (b, s + 3)).astype(np.int32)[:, :s]
    points = lattice_points(max(v, 2))[tokens] if distance or prime else None
    scalars = generator.standard_normal((h, distance + prime + same + matches))
    return ScoreBias(tokens, points, scalars, distance, prime, same, matches)


def _gradients(score_bias, generator):
    """Gradients with numbers in them already."""
    points = None if score_bias.points is None else generator.standard_normal(score_bias.points.shape)
    return ScoreBiasGradients(generator.standard_normal(score_bias.scalars.shape), points)


def _settings(case):
    return {"causal": case[6], "scale": 1 / math.sqrt(case[5])}


def _backward_arrays(case, arrays, generator):
    b, t, s, h, kv, d, _, _ = case
    gradients = np.zeros((b, s, h + 2 * kv, d))
    dq, dk, dv = gradients[:, s - t :, :h], gradients[:, :, h : h + kv], gradients[:, :, h + kv :]
    return [generator.standard_normal(arrays[0].shape), *arrays, dq, dk, dv]


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(agree, generator, case, combination):
    b, t, s, h, kv, d, _, _ = case
    score_bias, settings = _score_bias(case, combination, generator), _settings(case)
    arrays = _arrays(case, generator)
    # each score is the sum of D products and of the terms
    agree("attention_forward", arrays, terms=s + d + score_bias.count, lattice={"score_bias": score_bias}, **settings)
    reference.attention_forward(np, *arrays, score_bias=score_bias, **settings)
    lattice = {"score_bias": score_bias, "dscore_bias": _gradients(score_bias, generator)}
    # a scalar's gradient is a sum over all pairs whose parts cancel; its error grows as the root of their number
    count = 2 * (s + t * h // kv + d) + int(8 * math.sqrt(b * t * s)) + score_bias.count
    agree("attention_backward", _backward_arrays(case, arrays, generator), terms=count, lattice=lattice, **settings)


@pytest.mark.parametrize("matches", range(1, 9))
def test_every_order(agree, generator, matches):
    case = (2, 40, 40, 2, 2, 4, True, 2)
    score_bias, arrays = _score_bias(case, (False, False, False, matches), generator), _arrays(case, generator)
    agree("attention_forward", arrays, terms=44, lattice={"score_bias": score_bias}, **_settings(case))


def _run(library, case, arrays, dout, dtype, score_bias=None, dscore_bias=None):
    """Everything forward and backward give, in this dtype."""
    q, k, v = (x.astype(dtype) for x in arrays[:3])
    out, lse, dq, dk, dv = (np.zeros(x.shape, dtype) for x in (*arrays[3:], q, k, v))
    with_score_bias = {} if score_bias is None else {"score_bias": score_bias}
    attention_forward(library, q, k, v, out, lse, **_settings(case), **with_score_bias)
    with_score_bias |= {} if dscore_bias is None else {"dscore_bias": dscore_bias}
    attention_backward(library, dout.astype(dtype), q, k, v, out, lse, dq, dk, dv, **_settings(case), **with_score_bias)
    return out, lse, dq, dk, dv


def _in(dtype, score_bias):
    points = None if score_bias.points is None else score_bias.points.astype(dtype)
    return dataclasses.replace(score_bias, points=points, scalars=score_bias.scalars.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("combination", [(False, False, True, 8), (True, True, True, 8)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scalars_of_zero_change_no_bit(library, generator, case, combination, dtype):
    score_bias = _in(dtype, _score_bias(case, combination, generator))
    score_bias.scalars[...] = 0
    arrays, dout = _arrays(case, generator), generator.standard_normal((case[0], case[1], case[3], case[5]))
    standard = _run(library, case, arrays, dout, dtype)
    for mine, theirs in zip(_run(library, case, arrays, dout, dtype, score_bias), standard, strict=True):
        assert np.array_equal(mine, theirs)


def test_same_bits_at_every_run_and_added_to_what_is_there(library, generator):
    case = (3, 150, 150, 4, 2, 8, True, 3)
    score_bias = _in(np.float32, _score_bias(case, (True, True, True, 8), generator))
    arrays, dout = _arrays(case, generator), generator.standard_normal((3, 150, 4, 8))
    results = []
    for start in (0.0, 0.0, 1.0):
        dscore_bias = ScoreBiasGradients(
            np.full_like(score_bias.scalars, start), np.full_like(score_bias.points, start)
        )
        results.append(
            (
                *_run(library, case, arrays, dout, np.float32, score_bias, dscore_bias),
                dscore_bias.scalars,
                dscore_bias.points,
            )
        )
    for first, second in zip(results[0], results[1], strict=True):
        assert np.array_equal(first, second)
    eps = float(np.finfo(np.float32).eps)  # of sums no larger than their parts, once for each batch item
    for zero, one in zip(results[0][-2:], results[2][-2:], strict=True):
        assert np.any(zero)
        assert np.max(np.abs(one - 1 - zero)) <= 3 * eps * (1 + np.max(np.abs(zero)))


def test_gradients_not_wanted(library, generator):
    """None for the scalars' or the points' gradients changes nothing else, and nor does no dscore_bias at all."""
    case = (2, 20, 20, 2, 1, 8, True, 3)
    score_bias = _score_bias(case, (True, True, True, 3), generator)
    arrays, dout = _arrays(case, generator), generator.standard_normal((2, 20, 2, 8))

    def zeros(scalars, points):
        return ScoreBiasGradients(
            np.zeros_like(score_bias.scalars) if scalars else None, np.zeros_like(score_bias.points) if points else None
        )

    both, only_scalars, only_points = zeros(True, True), zeros(True, False), zeros(False, True)
    results = [
        _run(library, case, arrays, dout, np.float64, score_bias, g) for g in (both, only_scalars, only_points, None)
    ]
    assert np.array_equal(both.scalars, only_scalars.scalars)
    assert np.array_equal(both.points, only_points.points)
    for other in results[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lengths_of_matches(library, dtype):
    """Scalars of powers of two and no products: the scores, and so the weights, tell the length of every match."""
    tokens = np.array([[1, 2, 3, 1, 2, 3, 1, 2, 3, 9]], np.int32)
    positions, scalars = tokens.shape[1], (2.0 ** -np.arange(8))[None].astype(dtype)
    q, k, v = np.zeros((3, 1, positions, 1, positions), dtype)
    v[0, :, 0] = np.eye(positions)
    out, lse = np.zeros_like(q), np.zeros((1, 1, positions), dtype)
    score_bias = ScoreBias(tokens, None, scalars, False, False, False, 8)
    attention_forward(library, q, k, v, out, lse, causal=False, scale=1.0, score_bias=score_bias)
    weights = out[0, :, 0]
    for i, j in itertools.product(range(positions), repeat=2):
        length = 0
        while length < min(8, i + 1, j) and tokens[0, i - length] == tokens[0, j - 1 - length]:
            length += 1
        score = float(np.log(weights[i, j]) + lse[0, 0, i])
        assert abs(score - sum(scalars[0, :length])) <= 16 * np.finfo(dtype).eps


@pytest.mark.parametrize("term", range(4))
def test_non_finite_scalars_reach_the_output(library, generator, term):
    case = (1, 9, 9, 1, 1, 8, True, 1)
    score_bias = _score_bias(case, (True, True, True, 1), generator)
    score_bias.scalars[0, term] = np.nan
    out = _run(library, case, _arrays(case, generator), np.ones((1, 9, 1, 8)), np.float64, score_bias)[0]
    assert np.isnan(out[0, 1:]).all()  # with one token all pairs count, but for the match of the first with itself


def _refused():
    points, scalars = np.zeros((2, 6, 3), np.float32), np.zeros((3, 4), np.float32)
    tokens = np.zeros((2, 6), np.int32)
    good = ScoreBias(tokens, points, scalars, True, True, True, 1)
    change = dataclasses.replace
    wide = np.zeros((2, 6, 2), np.int32)[..., 0]
    return [
        (change(good, tokens=tokens.astype(np.int64)), None, r"tokens is int64 .*expected int32 \(2, 6\)"),
        (change(good, tokens=tokens[:, 1:]), None, r"tokens is int32 \(2, 5\).*expected int32 \(2, 6\)"),
        (change(good, tokens=wide), None, "tokens is .*contiguous along the last axis"),
        (change(good, points=points.astype(np.float64)), None, r"points is float64 .*expected float32"),
        (change(good, points=points[..., :2]), None, r"points is .*expected float32 \(2, 6, 3\)"),
        (change(good, points=None), None, "points is None"),
        (change(good, scalars=scalars[:, :3]), None, r"scalars is .*\(3, 3\).*expected float32 \(3, 4\)"),
        (change(good, scalars=scalars.astype(np.float64)), None, "scalars is float64"),
        (change(good, matches=9), None, "matches is 9; expected 0 … 8"),
        (change(good, matches=-1), None, "matches is -1; expected 0 … 8"),
        (good, ScoreBiasGradients(scalars[:2], None), r"dscalars is .*\(2, 4\).*expected float32 \(3, 4\)"),
        (good, ScoreBiasGradients(scalars, points[:1]), r"dpoints is .*\(1, 6, 3\).*expected float32 \(2, 6, 3\)"),
        (
            ScoreBias(tokens, None, scalars, False, False, True, 3),
            ScoreBiasGradients(scalars, points),
            "dpoints is given, but no term uses the points",
        ),
    ]


@pytest.mark.parametrize(
    ("score_bias", "dscore_bias", "message"), _refused(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_refused_arguments(library, score_bias, dscore_bias, message):
    q, k, v, out, dq, dk, dv = np.zeros((7, 2, 6, 3, 4), np.float32)
    lse, settings = np.zeros((2, 3, 6), np.float32), {"causal": True, "scale": 0.5}
    with pytest.raises(ValueError, match=message):
        attention_backward(
            library, out, q, k, v, out, lse, dq, dk, dv, score_bias=score_bias, dscore_bias=dscore_bias, **settings
        )
    if dscore_bias is None:
        with pytest.raises(ValueError, match=message):
            attention_forward(library, q, k, v, out, lse, score_bias=score_bias, **settings)


def test_scale_of_zero_is_refused_with_terms(library):
    q, k, v, out = np.zeros((4, 1, 2, 1, 4), np.float32)
    lse = np.zeros((1, 1, 2), np.float32)
    score_bias = ScoreBias(np.zeros((1, 2), np.int32), None, np.zeros((1, 1), np.float32), False, False, True, 0)
    attention_forward(library, q, k, v, out, lse, causal=True, scale=0.0)
    with pytest.raises(ValueError, match="scale is 0"):
        attention_forward(library, q, k, v, out, lse, causal=True, scale=0.0, score_bias=score_bias)
