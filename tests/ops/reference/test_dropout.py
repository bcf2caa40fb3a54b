"""Dropout: statistics, purity in the element's index, the derivative, aliasing, extremes of the rate."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from cllm_gpu.ops.reference.dropout import Dropout, dropout_backward, dropout_forward
from cllm_gpu.ops.reference.tiling import CPU_TILE_ELEMENTS

BASE = Dropout(rate=0.3, seed=2**40 + 5, step=7, site=2)


def mask(shape, dropout=BASE, dtype=np.float64):
    out = np.full(shape, np.nan, dtype)
    dropout_forward(np, np.ones(shape, dtype), out, dropout=dropout)
    return out


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_share_and_scale(rate):
    """The share of n independent draws lies within five deviations √(rate(1 − rate)/n) of the rate."""
    kept = mask((500, 401), dataclasses.replace(BASE, rate=rate))
    assert set(np.unique(kept)) == {0.0, 1.0 / (1.0 - rate)}
    share = float(np.mean(kept == 0))
    assert abs(share - rate) <= 5 * math.sqrt(rate * (1 - rate) / kept.size)


def test_neighbours_rows_sites_and_steps_are_independent():
    """Correlation of n independent pairs has deviation 1/√n."""
    n = 1 << 16
    first = mask((n,)) == 0
    others = [
        mask((n,), dataclasses.replace(BASE, **change)) == 0 for change in ({"site": 3}, {"step": 8}, {"seed": 1})
    ]
    for other in [*others, np.roll(first, 1), np.roll(first, 4), np.roll(first, 64)]:
        assert abs(np.corrcoef(first, other)[0, 1]) <= 5 / math.sqrt(n)


def test_an_element_depends_on_its_index_in_the_whole_batch_alone():
    """What makes a batch split over threads or micro-batches equal the whole: also across a tile's edge."""
    rows, width = 3 * CPU_TILE_ELEMENTS // 50, 50
    whole = mask((rows, width))
    for start, stop in ((0, 1), (1, 7), (CPU_TILE_ELEMENTS // 50 - 1, rows)):
        part = mask((stop - start, width), dataclasses.replace(BASE, first_element=start * width))
        np.testing.assert_array_equal(part, whole[start:stop])


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 11)])
def test_backward_is_the_derivative(shape, generator, gradient_error, within):
    x, dout, dx = generator.standard_normal(shape), generator.standard_normal(shape), np.full(shape, np.nan)
    dropout_backward(np, dout, dx, dropout=BASE)

    def f():
        out = np.empty(shape)
        dropout_forward(np, x, out, dropout=BASE)
        return float(np.sum(out * dout))

    within(f"dx {shape}", gradient_error(f, x, dx), 1e-7)


def test_in_place_and_float32_masks_are_the_same(generator):
    x = generator.standard_normal((33, 7))
    apart, in_place = np.empty_like(x), x.copy()
    dropout_forward(np, x, apart, dropout=BASE)
    dropout_forward(np, in_place, in_place, dropout=BASE)
    np.testing.assert_array_equal(apart, in_place)
    np.testing.assert_array_equal(mask((33, 7), dtype=np.float32) == 0, mask((33, 7)) == 0)


def test_rate_zero_changes_nothing_and_the_last_seed_works():
    np.testing.assert_array_equal(mask((9, 9), dataclasses.replace(BASE, rate=0.0)), 1)
    assert 0 < np.count_nonzero(mask((99,), dataclasses.replace(BASE, seed=2**64 - 1))) < 99
