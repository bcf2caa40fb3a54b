"""StepGuard: non-finite steps, spikes, the end of a run, its state through JSON."""

from __future__ import annotations

import json
import math

import pytest

from cllm_gpu.errors import UserError
from cllm_gpu.guards import StepGuard


def guard(*, skipped=3, window=0, deviations=4.0):
    return StepGuard(maximum_skipped=skipped, spike_window=window, spike_deviations=deviations)


def calm(g, steps=8):
    """A window of losses 2 ± 0.1 and norms 1 ± 0.05."""
    for step in range(steps):
        sign = 1 if step % 2 else -1
        assert g.judge(2 + sign * 0.1, 1 + sign * 0.05) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_step_is_turned_away_and_counted(bad):
    g = guard()
    for loss, norm, word in ((bad, 1.0, "loss"), (1.0, bad, "gradient")):
        reason = g.judge(loss, norm)
        assert reason is not None
        assert word in reason
        assert "\n" not in reason
    assert (g.skipped, g.skipped_in_a_row) == (2, 2)


def test_a_good_step_ends_the_row_but_not_the_count():
    g = guard()
    g.judge(math.nan, 1.0)
    assert g.judge(1.0, 1.0) is None
    assert (g.skipped, g.skipped_in_a_row) == (1, 0)
    g.check()


@pytest.mark.parametrize("maximum", [1, 3])
def test_training_stops_after_the_configured_number_in_a_row(maximum):
    g = guard(skipped=maximum)
    for _ in range(maximum):
        g.check()
        g.judge(math.nan, 1.0)
    with pytest.raises(UserError) as caught:
        g.check()
    line = str(caught.value)
    assert str(maximum) in line
    assert "non-finite loss (nan)" in line
    assert "optimizer.rate" in line


def test_without_a_window_no_finite_step_is_a_spike():
    g = guard(window=0)
    calm(g, 20)
    assert g.judge(1e30, 1e30) is None


def test_a_spike_of_loss_or_norm_is_turned_away_once_the_window_is_full():
    g = guard(window=8)
    calm(g, 7)
    assert g.judge(2.0, 1.0) is None
    # loss: mean 2 and deviation below 0.1, so 4 deviations end below 2.4; norm: below 1.2
    assert "loss" in (g.judge(2.5, 1.0) or "")
    assert "gradient norm" in (g.judge(2.0, 1.25) or "")
    assert g.judge(2.3, 1.1) is None
    assert g.judge(0.0, 0.0) is None  # downwards is no spike


def test_a_first_step_far_off_is_no_spike_while_the_window_fills():
    g = guard(window=8)
    assert g.judge(11.0, 50.0) is None
    calm(g, 6)
    assert g.judge(9.0, 1.0) is None


def test_a_spike_does_not_enter_the_window():
    g = guard(window=8, skipped=100)
    calm(g)
    assert all(g.judge(50.0, 1.0) is not None for _ in range(20))
    assert g.judge(2.0, 1.0) is None


def test_a_plateau_does_not_make_noise_a_spike():
    g = guard(window=4)
    for _ in range(4):
        g.judge(2.0, 1.0)
    assert g.judge(2.0 + 1e-6, 1.0 + 1e-6) is None
    assert g.judge(2.2, 1.0) is not None  # 4 deviations of at least one hundredth of the mean


def test_the_advice_after_spikes_is_about_spikes():
    g = guard(window=4, skipped=1)
    calm(g, 4)
    g.judge(99.0, 1.0)
    with pytest.raises(UserError, match="spike_deviations"):
        g.check()


def test_a_step_the_optimizer_refuses_counts_too():
    g = guard(skipped=2)
    for _ in range(2):
        g.refuse("gradient too large")
    with pytest.raises(UserError, match="gradient too large"):
        g.check()


def test_state_survives_json_exactly_and_the_run_goes_on_the_same():
    values = [(2 + math.sin(i) / 3, 1 + math.cos(i * i) / 7) for i in range(60)]
    whole, first = guard(window=16, deviations=1.2, skipped=99), guard(window=16, deviations=1.2, skipped=99)
    verdicts = [whole.judge(*v) for v in values]
    assert any(verdicts)
    assert not all(verdicts)
    early = [first.judge(*v) for v in values[:30]]
    second = guard(window=16, deviations=1.2, skipped=99)
    second.restore(json.loads(json.dumps(first.as_dict(), allow_nan=False)))
    assert early + [second.judge(*v) for v in values[30:]] == verdicts
    assert second.as_dict() == whole.as_dict()


def test_a_smaller_window_keeps_the_newest():
    g = guard(window=8)
    calm(g)
    small = guard(window=2)
    small.restore(g.as_dict())
    assert small.as_dict()["losses"] == g.as_dict()["losses"][-2:]
