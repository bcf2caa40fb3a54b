"""Stochastic rounding: to a neighbour, right on average, the same bits however the array is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cllm_gpu.ops.precision import BFLOAT16
from cllm_gpu.ops.reference.adam import adam_step
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.ops.reference.philox import random_words
from cllm_gpu.ops.reference.rounding import SITE, StochasticRounding
from cllm_gpu.ops.reference.sgd import sgd_step

ROUNDING = StochasticRounding(seed=2**40 + 3, step=7)


def rounded(x, rounding=ROUNDING, start=0):
    return rounding.round(np, np.asarray(x, np.float32), start)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.03125, 0.5, 0.9])
def test_a_number_becomes_a_neighbour_and_the_mean_is_right(sign, share):
    """1 + share·2^-7 goes up with probability `share`; the mean of n draws is within 5 deviations."""
    count = 40_000
    got = sign * rounded(np.full(count, sign * (1 + share * 2.0**-7)))
    assert set(np.unique(got)) == {1.0, 1 + 2.0**-7}
    up = np.count_nonzero(got > 1) / count
    assert abs(up - share) <= 5 * math.sqrt(share * (1 - share) / count)


def test_what_bfloat16_holds_stays():
    x = np.array([0.0, -0.0, 1.0, -2.5, 2.0**-130, 3.0e38, np.inf, -np.inf], BFLOAT16).astype(np.float32)
    assert np.array_equal(rounded(x).view(np.uint32), x.view(np.uint32))
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(rounded(nans)).all()


def test_bits_belong_to_elements_and_steps(generator):
    x = generator.standard_normal(1003).astype(np.float32)
    whole = rounded(x)
    for cut in (1, 4, 514):
        later = rounded(x[cut:], ROUNDING.after(cut - 1), 1)
        assert np.array_equal(np.concatenate([rounded(x[:cut]), later]), whole)
    for other in (StochasticRounding(ROUNDING.seed, 8), StochasticRounding(3, ROUNDING.step)):
        assert not np.array_equal(rounded(x, other), whole)


def test_no_dropout_shares_its_words():
    mask = Dropout(0.1, seed=1, step=1, site=0)
    assert mask.site < SITE
    first, second = (random_words(np, 0, 64, seed=1, stream=(1, site)) for site in (mask.site, SITE))
    assert not np.any(first == second)


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_small_updates_are_not_lost(method):
    """1e-4 added to 1.0 a thousand times gives 1.1 on average over 512 weights; to the nearest it would stay 1.0.

    The deviation of one sum of 1000 draws is at most √1000·2^-8 = 0.12, that of the mean 0.0055; 4 of them.
    """
    p, size = np.ones(512, BFLOAT16), 512
    gradients, moments = np.full(size, -1.0, BFLOAT16), np.zeros((2, size), np.float32)
    for step in range(1000):
        rounding = StochasticRounding(1, step)
        if method == "sgd":
            sgd_step(
                np, p, gradients, None, rate=1e-4, momentum=0.0, weight_decay=0.0, decayed=0, gradient_scale=1.0,
                rounding=rounding,
            )  # fmt: skip
        else:  # every gradient the same: Adam moves by the rate
            adam_step(
                np, p, gradients, *moments, rate=1e-4, beta1=0.9, beta2=0.99, epsilon=1e-8, step=step + 1,
                weight_decay=0.0, decayed=0, decoupled=True, gradient_scale=1.0, rounding=rounding,
            )  # fmt: skip
    mean = float(p.astype(np.float64).mean())
    print(f"mean {mean:.4f}")
    assert abs(mean - 1.1) <= 4 * math.sqrt(1000) * 2.0**-8 / math.sqrt(size)
