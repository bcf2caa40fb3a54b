"""Learning-rate schedules: warmup, shapes, the minimum rate, steps beyond the end."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from cllm_gpu.config import ScheduleConfig
from cllm_gpu.optim.schedules import rate_at

PEAK = 0.4
NAMES = ["constant", "linear", "cosine", "step", "wsd"]


def rates(steps, **schedule):
    chosen = ScheduleConfig(**({"warmup_steps": 0} | schedule))
    return [rate_at(chosen, PEAK, steps, step) for step in range(steps)]


@pytest.mark.parametrize("name", NAMES)
def test_warmup_climbs_in_equal_steps_from_above_zero_to_the_peak(name):
    r = rates(20, name=name, warmup_steps=5, minimum_rate=0.3)
    assert r[:5] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4])  # not lifted to the minimum rate
    assert r[5] == PEAK


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_has_the_peak_without_warmup(name):
    assert rates(10, name=name)[0] == PEAK


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_after_the_warmup_the_rate_falls_and_stays_between_minimum_and_peak(name, warmup):
    r = rates(50, name=name, warmup_steps=warmup, minimum_rate=0.05, step_every=4, step_factor=0.6)[warmup:]
    assert all(0.05 <= b <= a <= PEAK for a, b in pairwise(r))


@pytest.mark.parametrize("name", NAMES)
def test_no_step_of_a_run_is_wasted_on_a_rate_of_zero(name):
    assert min(rates(100, name=name, warmup_steps=10, step_every=10)) > 0


def test_linear_falls_in_equal_steps():
    assert rates(8, name="linear", minimum_rate=0.0) == pytest.approx([0.4 - 0.05 * i for i in range(8)])
    assert rates(5, name="linear", warmup_steps=1, minimum_rate=0.2) == pytest.approx([0.4, 0.4, 0.35, 0.3, 0.25])


def test_cosine_is_half_way_at_half_time_and_symmetric():
    r = rates(40, name="cosine", minimum_rate=0.1)
    assert r[20] == pytest.approx(0.25)
    assert r[10] == pytest.approx(0.1 + 0.3 * (1 + math.sqrt(0.5)) / 2)
    assert [a + b for a, b in zip(r[1:], r[:0:-1], strict=True)] == pytest.approx([0.5] * 39)


def test_step_drops_by_the_factor_and_stops_at_the_minimum():
    r = rates(9, name="step", warmup_steps=1, step_every=2, step_factor=0.5, minimum_rate=0.12)
    assert r == pytest.approx([0.4, 0.4, 0.4, 0.2, 0.2, 0.12, 0.12, 0.12, 0.12])


def test_wsd_is_stable_then_decays_over_its_share_of_all_steps():
    r = rates(20, name="wsd", warmup_steps=4, decay_fraction=0.25, minimum_rate=0.1)
    assert r[3:15] == [PEAK] * 12
    assert r[15:] == pytest.approx([0.4, 0.34, 0.28, 0.22, 0.16])


@pytest.mark.parametrize(("fraction", "start"), [(0.0, 20), (1.0, 4)])
def test_wsd_may_decay_never_or_from_the_end_of_the_warmup(fraction, start):
    r = rates(20, name="wsd", warmup_steps=4, decay_fraction=fraction)
    assert r[4 : start + 1] == [PEAK] * len(r[4 : start + 1])
    assert all(b < a for a, b in pairwise(r[start:]))


@pytest.mark.parametrize(("name", "end"), [("linear", 0.1), ("cosine", 0.1), ("wsd", 0.1), ("constant", 0.4)])
def test_steps_past_the_end_keep_the_rate_of_the_end(name, end):
    schedule = ScheduleConfig(name=name, warmup_steps=0, minimum_rate=0.1)
    assert [rate_at(schedule, PEAK, 10, step) for step in (10, 11, 500)] == pytest.approx([end] * 3)


@pytest.mark.parametrize("name", NAMES)
def test_a_warmup_longer_than_the_run_never_reaches_the_peak(name):
    r = rates(5, name=name, warmup_steps=10)
    assert r == pytest.approx([PEAK * (i + 1) / 10 for i in range(5)])
    assert rate_at(ScheduleConfig(name=name, warmup_steps=10), PEAK, 5, 12) >= 0


def test_the_minimum_rate_may_be_the_peak():
    assert set(rates(10, name="cosine", minimum_rate=PEAK)) == {PEAK}
