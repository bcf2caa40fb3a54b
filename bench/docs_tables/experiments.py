"""Runs the experiments of docs/performance.md from committed configurations, and fills in the page's tables.

    python -m bench.docs_tables.experiments [--kept runs/performance] [--only NAME …]

optimizers, optimizers_mini    `cllm-gpu compare` over experiments/NAME.toml
gradient_flow, stability       runs of experiments/NAME.toml with diagnostics by layer

Each writes bench/results/NAME.json and NAME.png. Finished runs are kept in --kept, so the same command resumes after an
interruption. Takes about a quarter of an hour on two idle cores. Needs the extra `plots`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import shutil
import sys
from pathlib import Path
from typing import Any

from bench.docs_tables import fill
from bench.host import processor
from bench.paths import RESULTS, ROOT
from cllm_gpu.backend import get_backend
from cllm_gpu.cli import compare
from cllm_gpu.cli.config_flags import open_data
from cllm_gpu.cli.progress import ConsoleReporter, terminal
from cllm_gpu.config import Config, as_dict, with_absolute_paths
from cllm_gpu.experiments.ablation import load_experiment
from cllm_gpu.report.diagnostics import DiagnosedRun, plot_diagnostics, read_diagnosed, series
from cllm_gpu.report.figure import require_plots
from cllm_gpu.training.run_folder import METRICS, begin_run, load_configuration, lock_run, save_configuration
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils import exact_json
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import write_atomically
from cllm_gpu.utils.versions import environment, package_version

EXPERIMENTS = ROOT / "experiments"
COMPARED, DIAGNOSED = ("optimizers", "optimizers_mini"), ("gradient_flow", "stability")
OUTCOME = "outcome.json"
"""File in the folder of a run that finished, or that stopped because of too many skipped steps."""


def run_comparison(name: str, kept: Path) -> None:
    """Run an experiment of COMPARED."""
    folder = kept / name
    if compare.main(["--experiment", str(EXPERIMENTS / f"{name}.toml"), "--picture", "--output", str(folder)]):
        raise SystemExit(f"{name} was stopped")
    for ending in (".json", ".png"):
        shutil.copyfile(folder / f"{name}{ending}", RESULTS / f"{name}{ending}")


def run_diagnosed(name: str, kept: Path) -> None:
    """Run an experiment of DIAGNOSED, every variant from every seed; the plot has the first seed's finished runs."""
    experiment = load_experiment(EXPERIMENTS / f"{name}.toml")
    found: list[dict[str, Any]] = []
    for seed in experiment.seeds:
        for variant, config in experiment.variants():
            seeded = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))
            folder = kept / name / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"
            stopped = train(seeded, folder)
            found.append({"variant": variant, "seed": seed, **run_result(read_diagnosed([folder])[0], stopped)})
            print(f"{name}: {variant}, seed {seed}: loss {found[-1]['loss']}")
    data = {"made": provenance(), "title": experiment.title, "config": as_dict(experiment.base), "runs": found}
    write_atomically(RESULTS / f"{name}.json", exact_json.dumps(data) + "\n")
    shown = [run for run in found if run["seed"] == experiment.seeds[0] and run["stopped"] is None]
    plot_diagnostics([(run["variant"], run["series"]) for run in shown], RESULTS / f"{name}.png")


def train(config: Config, folder: Path) -> str | None:
    """Train in `folder`, unless the run is finished there. Returns why the run stopped early; None if it did not."""
    backend = get_backend(config.backend, workers=config.training.workers, precision=config.precision)
    loop = dataclasses.replace(config.training, workers=backend.workers)
    config = dataclasses.replace(config, output=folder, backend=backend.name, training=loop)
    outcome = folder / OUTCOME
    saved = dataclasses.replace(with_absolute_paths(config), output=folder)
    if outcome.exists() and load_configuration(folder) == saved:
        return exact_json.loads(outcome.read_bytes())["stopped"]
    if outcome.exists():
        raise UserError(f"{folder} holds a run of another configuration; remove it, or give another --kept")
    if (folder / METRICS).exists():  # an interrupted run
        shutil.rmtree(folder)
    display = ConsoleReporter(terminal(), config.training.steps, backend.memory_held)
    dataset = open_data(config, display)
    with lock_run(begin_run(folder)):
        stopped = _train(config, folder, Trainer(config, backend, dataset, folder=folder))
        write_atomically(outcome, exact_json.dumps({"stopped": stopped}))
    return stopped


def _train(config: Config, folder: Path, trainer: Trainer) -> str | None:
    try:
        trainer.initialise()
        save_configuration(folder, config)
        if trainer.train().interrupted:
            raise KeyboardInterrupt
    except UserError as error:
        return str(error)
    finally:
        trainer.close()
    return None


def run_result(run: DiagnosedRun, stopped: str | None) -> dict[str, Any]:
    """The entry of a run in the result file; figures rounded to six digits."""
    config, last = run.run.config, run.run.evaluations[-1:]
    assert config is not None
    return {
        "config": as_dict(dataclasses.replace(config, output=None)),
        "loss": last[0]["loss"] if last and stopped is None else None,
        "stopped": stopped,
        "steps": run.run.steps[-1]["step"],
        "series": _rounded(series(run)),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def provenance() -> dict[str, str]:
    """Date, processor and versions, for a result file."""
    versions = {**environment(), "ml_dtypes": package_version("ml_dtypes")}
    return {"date": datetime.date.today().isoformat(), "processor": processor(), **versions}


def main() -> int:
    """Train the runs that are not kept, write results and plots, and fill in the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, default=Path("runs/performance"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=COMPARED + DIAGNOSED, default=COMPARED + DIAGNOSED)
    options = parser.parse_args()
    try:
        require_plots()
        for name in options.only:
            (run_comparison if name in COMPARED else run_diagnosed)(name, options.kept)
    except UserError as error:
        print(f"performance_report: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes with the next run")
        return 130
    return fill.main()


if __name__ == "__main__":
    sys.exit(main())
