"""Experiments: what is refused, runs kept and taken up again, and the arithmetic of seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path

import pytest

from cllm_gpu.config import Config, ModelConfig
from cllm_gpu.experiments.ablation import SeedRun, _identity, _Recorder, load_experiment, run_experiment, summarise
from cllm_gpu.experiments.run_in_memory import Point
from cllm_gpu.report.ablation import experiment_data, experiment_table, plot_experiment
from cllm_gpu.utils.errors import UserError

TEXT = """
title = "T"
seeds = [1, 5]
[training]
steps = 30
[model]
size = "tiny"
[[variants]]
name = "standard"
[[variants]]
name = "two"
model.attention = "crystalline"
model.lattice.matches = 2
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text):
        path = tmp_path / "experiment.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def played(name, config, *, stopped=None):
    """A run whose numbers follow from its configuration."""
    seed = config.training.seed
    loss = 3.0 + 0.01 * seed - (0.2 + 0.001 * seed) * (name != "standard")
    points = (Point(15, 1.0, loss + 1), Point(30, 2.0, loss))
    return SeedRun(name, seed, points, 100, 0.5 if name == "standard" else 0.55, {}, stopped)


def test_variants_are_the_base_with_their_changes(write):
    experiment = load_experiment(write(TEXT))
    (first, standard), (second, two) = experiment.variants()
    assert (first, second) == ("standard", "two")
    assert standard == experiment.base
    assert standard.training.steps == 30
    assert two.model == dataclasses.replace(
        standard.model, attention="crystalline", lattice=dataclasses.replace(standard.model.lattice, matches=2)
    )
    assert two.training == standard.training
    shorter = dataclasses.replace(experiment.base, training=dataclasses.replace(experiment.base.training, steps=7))
    assert [config.training.steps for _, config in experiment.variants(shorter)] == [7, 7]


def test_variants_may_begin_from_a_model(write, tmp_path, monkeypatch):
    """The base is then of that model's shape, and what a variant changes stands over it."""
    seen = []

    def found(path):
        seen.append(path)
        model = ModelConfig.of(ModelConfig(size="tiny").architecture(300))
        return Config(initial=path, model=model)

    monkeypatch.setattr("cllm_gpu.experiments.ablation.initial_configuration", found)
    text = TEXT.replace('size = "tiny"', "dropout = 0.5").replace("[training]", 'initial = "runs/001"\n[training]')
    (_, standard), _ = load_experiment(write(text)).variants()
    assert seen == [Path("runs/001")] == [standard.initial]
    assert (standard.model.vocabulary, standard.model.width, standard.model.dropout) == (300, 64, 0.5)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('title = "T"', "", "title is missing"),
        ("[1, 5]", "[]", "seeds must be a list"),
        ("[1, 5]", "[1, -5]", "seeds must be a list"),
        ("[1, 5]", "[true]", "seeds must be a list"),
        ("[1, 5]", "[1, 1]", "a seed occurs twice"),
        ('name = "two"', "", "a variant has no name"),
        ('name = "two"', 'name = "standard"', "two variants are called 'standard'"),
        ("matches = 2", "matches = 20", "variant 'two': model.lattice.matches is 20"),
        ("matches = 2", "mathces = 2", "variant 'two': unknown key model.lattice.mathces; did you mean matches"),
        ("steps = 30", "stepz = 30", "unknown key training.stepz"),
        ("[[variants]]", "[variants]", "is not valid TOML"),
    ],
)
def test_what_is_refused(write, before, after, message):
    path = write(TEXT.replace(before, after))
    with pytest.raises(UserError, match=message) as caught:
        load_experiment(path)
    assert str(path) in str(caught.value)


def test_no_variants_and_no_file(write, tmp_path):
    with pytest.raises(UserError, match="there are no variants"):
        load_experiment(write(TEXT.split("[[variants]]")[0]))
    with pytest.raises(UserError, match=r"absent\.toml"):
        load_experiment(tmp_path / "absent.toml")


def test_runs_are_kept_and_taken_up_again(write, tmp_path):
    experiment, made, told = load_experiment(write(TEXT)), [], []

    def run(name, config):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((name, config.training.seed))
        return played(name, config)

    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, experiment.base, tmp_path, run)
    assert made == [("standard", 1), ("two", 1), ("standard", 5)]
    again = []
    runs = run_experiment(
        experiment, experiment.base, tmp_path,
        lambda name, config: again.append(name) or played(name, config),
        lambda run, known: told.append((run.variant, run.seed, known)),
    )  # fmt: skip
    assert again == ["two"]
    assert told == [("standard", 1, True), ("two", 1, True), ("standard", 5, True), ("two", 5, False)]
    assert runs == [played(name, config) for name, config in _configurations(experiment)]
    changed = dataclasses.replace(experiment.base, training=dataclasses.replace(experiment.base.training, steps=31))
    again.clear()
    run_experiment(experiment, changed, tmp_path, lambda name, config: again.append(name) or played(name, config))
    assert len(again) == 4  # another configuration is another run


def _configurations(experiment):
    for seed in experiment.seeds:
        for name, config in experiment.variants():
            yield name, dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))


def test_what_is_not_a_list_of_runs_is_refused(write, tmp_path):
    experiment = load_experiment(write(TEXT))
    (tmp_path / "runs.json").write_text("{}")
    with pytest.raises(UserError, match=r"runs\.json is not a list of runs"):
        run_experiment(experiment, experiment.base, tmp_path, played)


def test_summaries_are_taken_seed_by_seed(write, tmp_path):
    experiment = load_experiment(write(TEXT))
    runs = run_experiment(experiment, experiment.base, tmp_path, played)
    standard, two = summarise(experiment, runs)
    assert standard.gains == (0.0, 0.0)
    assert standard.loss == pytest.approx(3.03)
    assert two.gains == pytest.approx((0.201, 0.205))
    assert two.gain == pytest.approx(0.203)
    assert two.step_ratio == pytest.approx(1.1)
    table = experiment_table(experiment, runs)
    assert table.rows[1][2] == f"{two.loss:.4f} ± {statistics.stdev(two.losses):.4f}"
    assert table.rows[1][3].startswith("+0.2030 ± ")
    assert table.rows[1][4] == "+0.2010"
    assert table.rows[1][5] == "550.0 ms (1.10×)"
    data = json.loads(json.dumps(experiment_data(experiment, runs)))
    assert [summary["variant"] for summary in data["summaries"]] == ["standard", "two"]


def test_clipped_and_skipped_steps_are_counted():
    recorder = _Recorder(clip_norm=1.0)
    for norm, skipped in ((0.5, None), (2.0, None), (3.0, "spike of the gradient norm"), (math.nan, "not finite")):
        recorder.step({"seconds": 0.1, "gradient_norm": norm, "skipped": skipped})
    assert (recorder.clipped, recorder.skipped) == (1, 2)


def test_what_is_written_beside_a_run_makes_it_no_other():
    loop = dataclasses.replace(Config().training, diagnose_every=7, sample_every=3, tensorboard=True)
    assert _identity(dataclasses.replace(Config(), training=loop)) == _identity(Config())


def test_a_run_that_ended_early_has_no_loss(write, tmp_path):
    experiment = load_experiment(write(TEXT))
    runs = run_experiment(
        experiment, experiment.base, tmp_path,
        lambda name, config: played(name, config, stopped="5 steps in a row" if name == "two" else None),
    )  # fmt: skip
    assert summarise(experiment, runs)[1].loss == math.inf
    table = experiment_table(experiment, runs)
    assert any("two, seed 5: 5 steps in a row" in note for note in table.notes)


def test_pictures(write, tmp_path):
    pytest.importorskip("matplotlib")
    experiment = load_experiment(write(TEXT))
    runs = run_experiment(experiment, experiment.base, tmp_path, played)
    for name, start in (("picture.png", b"\x89PNG"), ("picture.svg", b"<?xml")):
        plot_experiment(experiment, runs, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
