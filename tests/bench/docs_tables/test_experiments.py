"""The performance report: runs are kept, results say what was run, and tables say what the results do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.docs_tables import experiments, performance_tables
from cllm_gpu.experiments.ablation import load_experiment
from cllm_gpu.utils import exact_json
from cllm_gpu.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SMALL = """
title = "T"
seeds = [1]
backend = "numpy"
[model]
layers = 2
heads = 2
width = 16
context = 12
[data]
source = "patterns"
[training]
steps = 6
batch = 2
workers = 1
evaluate_every = 3
evaluation_batches = 1
diagnose_every = 3
[[variants]]
name = "fp32"
[[variants]]
name = "bf16, no masters"
precision = "bf16"
optimizer.master_weights = false
[[variants]]
name = "too fast"
optimizer = { name = "sgd", rate = 1e30, clip_norm = 0.0 }
schedule = { warmup_steps = 0 }
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Experiments and results of our own."""
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("experiments", "results"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(experiments, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(performance_tables, "RESULTS", tmp_path / "results")
    (tmp_path / "experiments" / "stability.toml").write_text(SMALL, encoding="utf-8")
    return tmp_path


def test_runs_are_looked_into_kept_and_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    experiments.run_diagnosed("stability", place / "kept")
    results = place / "results"
    first, picture = (results / "stability.json").read_bytes(), (results / "stability.png").read_bytes()
    runs = {run["variant"]: run for run in exact_json.loads(first)["runs"]}
    assert picture.startswith(b"\x89PNG")
    assert [runs[name]["config"]["precision"] for name in ("fp32", "bf16, no masters")] == ["fp32", "bf16"]
    assert runs["fp32"]["series"]["steps"] == [1, 3, 6]
    assert runs["fp32"]["steps"] == 6
    assert runs["too fast"]["loss"] is None
    assert runs["too fast"]["series"]["skipped"] == 5

    table = performance_tables.stability().splitlines()
    assert table[2].startswith(f"| fp32 | 6 | {runs['fp32']['loss']:.4f} | ")
    assert table[4].startswith("| too fast | 6 | – | ")
    assert table[4].endswith(" | 0 | 5 |")
    assert "too fast: training stopped: 5 steps in a row skipped" in table[-1]
    assert "lower optimizer.rate" not in table[-1]

    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(experiments, "_train", never)
    experiments.run_diagnosed("stability", place / "kept")
    assert (results / "stability.json").read_bytes() == first


def test_a_kept_run_of_another_configuration_is_refused(place: Path) -> None:
    """And one that was stopped half way is made again."""
    _, config = load_experiment(place / "experiments" / "stability.toml").variants()[0]
    folder = place / "kept"
    assert experiments.train(config, folder) is None
    other = load_experiment(_written(place, SMALL.replace("steps = 6", "steps = 4"))).variants()[0][1]
    with pytest.raises(UserError, match=r"holds a run of another configuration; remove it, or give another --kept"):
        experiments.train(other, folder)
    (folder / experiments.OUTCOME).unlink()
    assert experiments.train(other, folder) is None
    assert len((folder / "diagnostics.jsonl").read_text().splitlines()) == 2


def _written(place: Path, text: str) -> Path:
    path = place / "other.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_not_of_a_run_is_not_removed(place: Path) -> None:
    _, config = load_experiment(place / "experiments" / "stability.toml").variants()[0]
    folder = place / "mine"
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    experiments.train(config, folder)
    assert (folder / "letter.txt").read_text() == "mine"
    shutil.rmtree(folder)


def test_a_wrong_experiment_is_one_line(place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    (place / "experiments" / "stability.toml").write_text("title = 3", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["performance_report.py", "--only", "stability"])
    assert experiments.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("performance_report: error: ")
    assert error.count("\n") == 1


def compared(losses: dict[str, list[float]], **counts: int) -> dict[str, Any]:
    return {
        "made": {"system": "S", "date": "D"},
        "seeds": [1, 2],
        "config": {"training": {"steps": 100}},
        "summaries": [{"variant": name, "losses": values} for name, values in losses.items()],
        "runs": [
            {"variant": name, "seed": seed, "clipped": 30 * seed, "skipped": 1} | counts
            for name in losses
            for seed in (1, 2)
        ],
    }


def test_losses_and_effects_are_seed_by_seed(place: Path) -> None:
    losses = {
        "SGD, constant": [3.0, 3.1], "SGD, constant, warm-up": [2.9, 3.1],
        "SGD, cosine": [2.5, 2.7], "SGD, cosine, warm-up": [2.4, 2.5],
    }  # fmt: skip
    (place / "results" / "optimizers.json").write_text(exact_json.dumps(compared(losses)), encoding="utf-8")
    lines = performance_tables.losses("optimizers").splitlines()
    assert lines[2] == "| SGD, constant | 3.0500 ± 0.0707 | 45% | 2 |"
    assert lines[-1] == "100 steps, mean ± standard deviation over seeds 1, 2; S, D."
    effects = performance_tables.schedule_effects("optimizers").splitlines()
    assert effects[2] == "| SGD | +0.0500 ± 0.0707 | +0.1500 ± 0.0707 | +0.4500 ± 0.0707 | +0.5500 ± 0.0707 |"
    assert len(effects) == 5


def test_a_run_that_was_stopped_has_no_mean(place: Path) -> None:
    found = compared({"SGD, constant": [3.0, float("inf")]}, clipped=None, skipped=None)  # type: ignore[arg-type]
    (place / "results" / "optimizers.json").write_text(exact_json.dumps(found), encoding="utf-8")
    assert performance_tables.losses("optimizers").splitlines()[2] == "| SGD, constant | – | – | – |"


@pytest.mark.parametrize("name", experiments.COMPARED + experiments.DIAGNOSED)
def test_the_committed_results_are_of_the_committed_experiments(name: str) -> None:
    """Every variant and seed of the file is in the result, from the very title, steps and rates."""
    experiment = load_experiment(ROOT / "experiments" / f"{name}.toml")
    found = exact_json.loads((ROOT / "bench" / "results" / f"{name}.json").read_bytes())
    assert found["title"] == experiment.title
    expected = {(variant, seed) for variant, _ in experiment.changes for seed in experiment.seeds}
    assert {(run["variant"], run["seed"]) for run in found["runs"]} == expected
    assert found["config"]["training"]["steps"] == experiment.base.training.steps
    assert found["config"]["model"]["attention"] == "standard"
