"""LossGuard: non-finite steps, spikes, the end of a run, its state through JSON."""

from __future__ import annotations

import json
import math

import pytest

from cllm_gpu.training.loss_guard import LossGuard
from cllm_gpu.utils.errors import UserError


def guard(*, skipped=3, window=0, deviations=4.0):
    return LossGuard(maximum_skipped=skipped, spike_window=window, spike_deviations=deviations)


def take(g, loss, norm):
    """A step that is applied unless the guard objects; the objection."""
    reason = g.judge(loss, norm)
    g.count(reason, loss, norm)
    return reason


def calm(g, steps=8):
    """A window of losses 2 ± 0.1 and norms 1 ± 0.05."""
    for step in range(steps):
        sign = 1 if step % 2 else -1
        assert take(g, 2 + sign * 0.1, 1 + sign * 0.05) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_step_is_turned_away_and_counted(bad):
    g = guard()
    for loss, norm, word in ((bad, 1.0, "loss"), (1.0, bad, "gradient")):
        reason = take(g, loss, norm)
        assert reason is not None
        assert word in reason
        assert "\n" not in reason
    assert (g.skipped, g.skipped_in_a_row) == (2, 2)


def test_a_good_step_ends_the_row_but_not_the_count():
    g = guard()
    take(g, math.nan, 1.0)
    assert take(g, 1.0, 1.0) is None
    assert (g.skipped, g.skipped_in_a_row) == (1, 0)
    g.check()


@pytest.mark.parametrize("maximum", [1, 3])
def test_training_stops_after_the_configured_number_in_a_row(maximum):
    g = guard(skipped=maximum)
    for _ in range(maximum):
        g.check()
        take(g, math.nan, 1.0)
    with pytest.raises(UserError) as caught:
        g.check()
    line = str(caught.value)
    assert str(maximum) in line
    assert "non-finite loss (nan)" in line
    assert "optimizer.rate" in line


def test_without_a_window_no_finite_step_is_a_spike():
    g = guard(window=0)
    calm(g, 20)
    assert take(g, 1e30, 1e30) is None


def test_a_spike_of_loss_or_norm_is_turned_away_once_the_window_is_full():
    g = guard(window=8)
    calm(g, 7)
    assert take(g, 2.0, 1.0) is None
    # loss: mean 2 and deviation below 0.1, so 4 deviations end below 2.4; norm: below 1.2
    assert "loss" in (take(g, 2.5, 1.0) or "")
    assert "gradient norm" in (take(g, 2.0, 1.25) or "")
    assert take(g, 2.3, 1.1) is None
    assert take(g, 0.0, 0.0) is None  # downwards is no spike


def test_a_first_step_far_off_is_no_spike_while_the_window_fills():
    g = guard(window=8)
    assert take(g, 11.0, 50.0) is None
    calm(g, 6)
    assert take(g, 9.0, 1.0) is None


def test_a_spike_does_not_enter_the_window():
    g = guard(window=8, skipped=100)
    calm(g)
    assert all(take(g, 50.0, 1.0) is not None for _ in range(20))
    assert take(g, 2.0, 1.0) is None


def test_a_plateau_does_not_make_noise_a_spike():
    g = guard(window=4)
    for _ in range(4):
        take(g, 2.0, 1.0)
    assert take(g, 2.0 + 1e-6, 1.0 + 1e-6) is None
    assert take(g, 2.2, 1.0) is not None  # 4 deviations of at least one hundredth of the mean


def test_the_advice_after_spikes_is_about_spikes():
    g = guard(window=4, skipped=1)
    calm(g, 4)
    take(g, 99.0, 1.0)
    with pytest.raises(UserError, match="spike_deviations"):
        g.check()


def test_a_step_the_optimizer_refuses_counts_too():
    g = guard(skipped=2, window=1)
    take(g, 2.0, 1.0)
    for _ in range(2):
        assert g.judge(2.0, 1.0) is None
        g.count("gradient too large", 2.0, 1.0)
    assert (g.skipped, g.skipped_in_a_row) == (2, 2)
    with pytest.raises(UserError, match="gradient too large"):
        g.check()


def test_state_survives_json_exactly_and_the_run_goes_on_the_same():
    values = [(2 + math.sin(i) / 3, 1 + math.cos(i * i) / 7) for i in range(60)]
    whole, first = guard(window=16, deviations=1.2, skipped=99), guard(window=16, deviations=1.2, skipped=99)
    verdicts = [take(whole, *v) for v in values]
    assert any(verdicts)
    assert not all(verdicts)
    early = [take(first, *v) for v in values[:30]]
    second = guard(window=16, deviations=1.2, skipped=99)
    second.restore(json.loads(json.dumps(first.as_dict(), allow_nan=False)))
    assert early + [take(second, *v) for v in values[30:]] == verdicts
    assert second.as_dict() == whole.as_dict()


def test_a_smaller_window_keeps_the_newest():
    g = guard(window=8)
    calm(g)
    small = guard(window=2)
    small.restore(g.as_dict())
    assert small.as_dict()["losses"] == g.as_dict()["losses"][-2:]
