"""The sampler against exact probabilities, and its limits."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.inference.sampling import Sampler
from cllm_gpu.utils.errors import UserError

LOGITS = np.log(np.array([0.4, 0.05, 0.25, 0.1, 0.2]))


def kept(probabilities):
    return set(np.flatnonzero(probabilities).tolist())


def test_temperature_zero_is_the_likeliest_token_and_the_first_of_equals():
    greedy = Sampler(temperature=0, top_k=0, top_p=1, seed=3)
    assert [greedy.pick(np.array([1.0, 3.0, 3.0, 2.0])) for _ in range(5)] == [1] * 5


@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
def test_top_k_of_one_equals_greedy(temperature):
    logits = np.random.default_rng(0).standard_normal((50, 30))
    one = Sampler(temperature=temperature, top_k=1, top_p=1, seed=3)
    greedy = Sampler(temperature=0, top_k=0, top_p=1, seed=4)
    assert [one.pick(x) for x in logits] == [greedy.pick(x) for x in logits]


def test_temperature_divides_the_logits():
    probabilities = Sampler(temperature=2.0).probabilities(LOGITS)
    expected = np.sqrt([0.4, 0.05, 0.25, 0.1, 0.2])
    np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-14)


def test_a_tiny_temperature_is_greedy_without_overflow():
    assert Sampler(temperature=1e-308).pick(np.array([-1e30, 5.0, 4.0])) == 1


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-9, {0}),
        (0.39, {0}),
        (0.41, {0, 2}),
        (0.64, {0, 2}),
        (0.66, {0, 2, 4}),
        (0.9, {0, 2, 4, 3}),
        (1.0, set(range(5))),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, expected):
    probabilities = Sampler(temperature=1, top_p=top_p).probabilities(LOGITS)
    assert kept(probabilities) == expected
    assert probabilities.sum() == pytest.approx(1, abs=1e-15)


def test_top_p_reached_exactly_takes_no_token_more():
    assert kept(Sampler(top_p=0.5).probabilities(np.zeros(4))) == {0, 1}  # ¼ + ¼ is exact in binary


@pytest.mark.parametrize(
    ("top_k", "expected"), [(1, {0}), (2, {0, 2}), (4, {0, 2, 3, 4}), (5, set(range(5))), (9, set(range(5)))]
)
def test_top_k_keeps_k(top_k, expected):
    assert kept(Sampler(top_k=top_k).probabilities(LOGITS)) == expected


def test_top_p_is_taken_over_what_top_k_left():
    # of {0.4, 0.25} the first is 0.615, so 0.6 needs it alone
    assert kept(Sampler(top_k=2, top_p=0.6).probabilities(LOGITS)) == {0}
    assert kept(Sampler(top_p=0.6).probabilities(LOGITS)) == {0, 2}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}])
def test_draws_follow_the_exact_probabilities(settings):
    sampler = Sampler(**{"temperature": 1.0, "seed": 11, **settings})
    expected = sampler.probabilities(LOGITS) * 8000
    counts = np.bincount([sampler.pick(LOGITS) for _ in range(8000)], minlength=5)
    assert (counts[expected == 0] == 0).all()
    there = expected > 0
    chi_square = ((counts - expected)[there] ** 2 / expected[there]).sum()
    # 99.9% quantiles of χ² with 1 to 4 degrees of freedom; the seed is fixed
    assert chi_square <= [10.83, 13.82, 16.27, 18.47][int(there.sum()) - 2]


def test_a_seed_decides_the_draws():
    first, again, other = (
        [s.pick(LOGITS) for _ in range(40)] for s in (Sampler(seed=5), Sampler(seed=5), Sampler(seed=6))
    )
    assert first == again != other


def test_float32_logits_are_taken_in_float64():
    x = LOGITS.astype(np.float32)
    np.testing.assert_array_equal(Sampler().probabilities(x), Sampler().probabilities(x.astype(np.float64)))


def test_a_token_of_no_probability_is_never_picked():
    sampler = Sampler(seed=1)
    assert {sampler.pick(np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf], []])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    with pytest.raises(UserError, match="not finite"):
        Sampler(temperature=temperature).pick(np.array(bad))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, r"top-p is 0\.0"),
        ({"top_p": 1.1}, r"top-p is 1\.1"),
        ({"top_p": float("nan")}, "top-p is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_with_no_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Sampler(**settings)
