"""Comparison: its arithmetic on curves made by hand, its grids, and real runs of a tiny model."""

from __future__ import annotations

import dataclasses
import math

import pytest

from cllm_gpu.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from cllm_gpu.data import open_dataset
from cllm_gpu.experiments.optimizer_comparison import RATES, Setting, compare, default_settings, next_rate, with_rate
from cllm_gpu.experiments.run_in_memory import Curve, CurveRecorder, Point, run_in_memory
from cllm_gpu.utils.errors import UserError


def curve(*losses, seconds=0.5, every=10, stopped=None):
    points = (Point(every * n, seconds * every * n, loss) for n, loss in enumerate(losses, start=1))
    return Curve(tuple(points), stopped)


def setting(family, rate):
    return with_rate(Setting("", family, Config(optimizer=OptimizerConfig(name=family.split()[0]))), rate)


def played(curves):
    """A `run` that knows the curve of every (optimizer, rate), and what it was asked for."""
    asked = []

    def run(config):
        asked.append((config.optimizer.name, config.optimizer.rate))
        return curves[asked[-1]]

    return run, asked


CURVES = {
    ("sgd", 0.01): curve(5.0, 4.5, 4.0, 3.9),
    ("sgd", 0.1): curve(4.0, 3.0, 2.5, 2.4),
    ("sgd", 1.0): curve(4.5, math.nan, math.inf),
    ("adam", 0.001): curve(3.5, 2.39, 2.0, 1.9, seconds=1.0),
    ("adam", 0.01): curve(2.4, 2.3, 2.2, 2.1, seconds=1.0),
    ("adam", 0.0001): curve(5.0, 4.0, 3.0, 2.5, seconds=1.0),
}


def test_the_rows_are_the_arithmetic_of_the_curves():
    run, asked = played(CURVES)
    told = []
    result = compare([setting(*key) for key in CURVES], run, report=lambda done: told.append(done.setting.name))
    assert asked == list(CURVES)
    assert told == [f"{family} rate {rate:g}" for family, rate in CURVES]
    assert result.target == 2.4
    sgd, adam = result.rows
    assert (sgd.family, sgd.runs, sgd.rate, sgd.best_loss, sgd.at_edge) == ("sgd", 3, 0.1, 2.4, False)
    assert (sgd.steps, sgd.seconds, sgd.steps_sooner, sgd.seconds_sooner) == (40, 20.0, 1.0, 1.0)
    assert (adam.rate, adam.best_loss, adam.at_edge) == (0.001, 1.9, False)
    assert (adam.steps, adam.steps_sooner) == (20, 2.0)
    assert (adam.seconds, adam.seconds_sooner) == (20.0, 1.0)
    assert (adam.fastest, adam.fastest_steps, adam.fastest_sooner) == ("adam rate 0.01", 10, 4.0)
    assert [r.setting.name for r in result.tuned()] == ["sgd rate 0.1", "adam rate 0.001"]


def test_a_family_that_never_gets_there_says_so():
    curves = {**CURVES, **{("adam", rate): curve(9.0, 8.0) for rate in (0.0001, 0.001, 0.01)}}
    run, _ = played(curves)
    adam = compare([setting(*key) for key in curves], run, extensions=0).rows[1]
    assert adam.steps is adam.seconds is adam.steps_sooner is adam.seconds_sooner is None
    assert adam.fastest is adam.fastest_steps is adam.fastest_sooner is None
    assert adam.best_loss == 8.0


def test_the_grid_is_extended_where_the_best_rate_is_at_its_end():
    losses = {0.1: 3.0, 0.3: 2.0, 0.9: 1.5, 2.7: 1.0, 8.1: 4.0}
    curves = {("sgd", rate): curve(5.0, loss) for rate, loss in losses.items()}
    run, asked = played(curves)
    result = compare([setting("sgd", 0.1), setting("sgd", 0.3)], run)
    assert [rate for _, rate in asked] == [0.1, 0.3, 0.9, 2.7, 8.1]
    assert (result.rows[0].rate, result.rows[0].at_edge, result.rows[0].runs) == (2.7, False, 5)


def test_a_grid_is_extended_no_further_than_allowed_and_says_that_it_ended_there():
    run, asked = played({("sgd", rate): curve(5.0, rate) for rate in (0.9, 0.3, 0.1, 0.0333)})
    result = compare([setting("sgd", 0.3), setting("sgd", 0.9)], run, extensions=2)
    assert [rate for _, rate in asked] == [0.3, 0.9, 0.1, 0.0333]
    assert result.rows[0].at_edge


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ([(1, 2.0), (10, 1.0), (100, 3.0)], None),
        ([(100, 3.0), (1, 1.0), (10, 2.0)], 0.1),
        ([(1, 3.0), (10, 2.0), (100, 1.0)], 1000),
        ([(1, 1.0)], None),
        ([(1, math.inf), (10, math.inf)], None),
        ([(1, math.inf), (10, 1.0)], 100),
    ],
)
def test_next_rate(tried, expected):
    assert next_rate(tried) == (expected if expected is None else pytest.approx(expected))


def test_what_a_curve_says():
    c = curve(3.0, math.nan, 2.0, 2.0, 2.5)
    assert c.best == c.points[2]
    assert c.reach(3.0) == c.points[0]
    assert c.reach(2.9) == c.points[2]  # a NaN is not below anything
    assert c.reach(1.9) is None
    assert curve(math.nan, math.inf).best is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([setting("adam", 0.1)], "against sgd, which is not among adam"),
        ([setting("sgd", 0.1), setting("sgd", 0.1)], "same name"),
        (
            [
                setting("sgd", 0.1),
                dataclasses.replace(setting("adam", 0.1), config=Config(training=TrainingConfig(seed=2))),
            ],
            "adam rate 0.1 and sgd rate 0.1 differ in more than",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        compare(settings, lambda config: curve(1.0))


def test_a_baseline_that_diverged_is_refused():
    with pytest.raises(UserError, match="no run of sgd reached a finite loss"):
        compare([setting("sgd", 0.1)], lambda config: curve(math.nan, stopped="training stopped"))


# ---- the grids


def test_every_family_has_a_grid_of_the_same_size_and_differs_in_nothing_else():
    config = Config(
        optimizer=OptimizerConfig(rate=1e-3),
        schedule=ScheduleConfig(name="cosine", minimum_rate=1e-4),
        training=TrainingConfig(steps=400),
    )
    settings = default_settings(config, schedules=("cosine", "wsd"))
    families = {s.family: [t for t in settings if t.family == s.family] for s in settings}
    assert list(families) == ["sgd", "adam", "adamw", "adamw wsd"]  # cosine is the configuration's own
    assert {len(grid) for grid in families.values()} == {len(RATES["sgd"])}
    for family, grid in families.items():
        assert [s.rate for s in grid] == list(RATES[family.split()[0]])
        assert len({s.name for s in grid}) == len(grid)
        for s in grid:
            assert s.config.optimizer.name == family.split()[0]
            assert s.config.schedule.name == ("wsd" if family.endswith("wsd") else "cosine")
            assert s.config.schedule.minimum_rate == pytest.approx(0.1 * s.rate)  # 1e-4 of 1e-3
            assert s.config.optimizer.weight_decay == (0.1 if "adamw" in family else 0.0)
            assert s.config.training == dataclasses.replace(config.training, evaluate_every=10)


@pytest.mark.parametrize(("every", "steps", "expected"), [(0, 400, 10), (5, 400, 5), (250, 400, 10), (250, 7, 1)])
def test_runs_are_evaluated_often_enough(every, steps, expected):
    settings = default_settings(Config(training=TrainingConfig(steps=steps, evaluate_every=every)))
    assert {s.config.training.evaluate_every for s in settings} == {expected}


def test_the_configured_weight_decay_is_kept():
    settings = default_settings(Config(optimizer=OptimizerConfig(weight_decay=0.02)))
    assert {s.config.optimizer.weight_decay for s in settings} == {0.02}


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="schedule 'cosin' is not known; choose from constant"):
        default_settings(Config(), schedules=("cosin",))
    with pytest.raises(UserError, match="optimizer 'lion' is not known"):
        default_settings(Config(), optimizers=("lion",))


# ---- real runs


def test_the_recorder_counts_the_time_of_steps_only():
    recorder = CurveRecorder()
    for step in range(1, 5):
        recorder.step({"seconds": 0.25})
        if step % 2 == 0:
            recorder.evaluation({"step": step, "loss": 1.0 / step})
    assert recorder.points == [Point(2, 0.5, 0.5), Point(4, 1.0, 0.25)]


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    """A configuration of a tiny model on `patterns`, and the data."""
    config = Config(
        model=ModelConfig(size="tiny", layers=1, heads=2, width=16, context=16),
        data=DataConfig(source="patterns", tokenizer="patterns"),
        optimizer=OptimizerConfig(rate=0.003),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
        training=TrainingConfig(steps=60, batch=8, evaluate_every=5, evaluation_batches=4, workers=1),
    )
    folder = tmp_path_factory.mktemp("cache")
    data = open_dataset(
        "patterns", tokenizer="patterns", validation_fraction=0.05, seed=1, cache_folder=folder, context=16
    )
    return config, data


def test_a_real_run_gives_its_evaluations_and_again_the_same(patterns, backend):
    config, data = patterns
    first, again = (run_in_memory(config, backend, data) for _ in range(2))
    assert [p.step for p in first.points] == list(range(5, 61, 5))
    assert [p.loss for p in first.points] == [p.loss for p in again.points]
    assert first.points[-1].loss < first.points[0].loss - 0.1
    assert first.stopped is None
    seconds = [p.seconds for p in first.points]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_a_run_that_diverges_ends_early_and_says_why(patterns, backend):
    config, data = patterns
    wild = dataclasses.replace(
        config, optimizer=OptimizerConfig(name="sgd", rate=1e30, clip_norm=0.0), schedule=config.schedule
    )
    result = run_in_memory(wild, backend, data)
    assert result.stopped is not None
    assert "non-finite" in result.stopped


def test_adam_reaches_sgd_s_best_loss_sooner(patterns, backend):
    """Two rates each on a model of 16 features: the direction the full comparison measures, not its size."""
    config, data = patterns
    chosen = {"sgd": (0.1, 0.3), "adam": (0.01, 0.03)}
    settings = [s for s in default_settings(config, optimizers=("sgd", "adam")) if s.rate in chosen[s.family]]
    assert len(settings) == 4
    result = compare(settings, lambda c: run_in_memory(c, backend, data), extensions=0)
    sgd, adam = result.rows
    assert sgd.best_loss == result.target
    assert adam.best_loss < sgd.best_loss
    assert adam.fastest_steps is not None
    assert adam.fastest_steps < sgd.steps
