"""Makes what docs/performance.md shows of training from the committed experiments, and fills the page's tables.

    python -m bench.docs_tables.experiments [--kept runs/performance] [--only NAME …]

optimizers, optimizers_mini    `cllm-gpu compare` over experiments/NAME.toml
gradient_flow, stability       runs of experiments/NAME.toml with looks at gradients and activations by layer

Each writes bench/results/NAME.json and NAME.png. A run that is done is kept in --kept: the same command goes on after a
stop. A quarter of an hour or so on two free cores. Needs the extra `plots`.
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
COMPARED, LOOKED_INTO = ("optimizers", "optimizers_mini"), ("gradient_flow", "stability")
OUTCOME = "outcome.json"
"""In the folder of a run that came to its end, or was stopped by too many refused steps."""


def compared(name: str, kept: Path) -> None:
    """One of COMPARED."""
    folder = kept / name
    if compare.main(["--experiment", str(EXPERIMENTS / f"{name}.toml"), "--picture", "--output", str(folder)]):
        raise SystemExit(f"{name} was stopped")
    for ending in (".json", ".png"):
        shutil.copyfile(folder / f"{name}{ending}", RESULTS / f"{name}{ending}")


def looked_into(name: str, kept: Path) -> None:
    """One of LOOKED_INTO: a run for every variant and seed; the picture has the first seed's that came to their end."""
    experiment = load_experiment(EXPERIMENTS / f"{name}.toml")
    found: list[dict[str, Any]] = []
    for seed in experiment.seeds:
        for variant, config in experiment.variants():
            seeded = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))
            folder = kept / name / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"
            stopped = trained(seeded, folder)
            found.append({"variant": variant, "seed": seed, **what_came_of(read_diagnosed([folder])[0], stopped)})
            print(f"{name}: {variant}, seed {seed}: loss {found[-1]['loss']}")
    data = {"made": made(), "title": experiment.title, "config": as_dict(experiment.base), "runs": found}
    write_atomically(RESULTS / f"{name}.json", exact_json.dumps(data) + "\n")
    shown = [run for run in found if run["seed"] == experiment.seeds[0] and run["stopped"] is None]
    plot_diagnostics([(run["variant"], run["series"]) for run in shown], RESULTS / f"{name}.png")


def trained(config: Config, folder: Path) -> str | None:
    """Train into `folder`, unless that was done; why the run was stopped early, or None."""
    backend = get_backend(config.backend, workers=config.training.workers, precision=config.precision)
    loop = dataclasses.replace(config.training, workers=backend.workers)
    config = dataclasses.replace(config, output=folder, backend=backend.name, training=loop)
    outcome = folder / OUTCOME
    saved = dataclasses.replace(with_absolute_paths(config), output=folder)
    if outcome.exists() and load_configuration(folder) == saved:
        return exact_json.loads(outcome.read_bytes())["stopped"]
    if outcome.exists():
        raise UserError(f"{folder} holds a run of another configuration; remove it, or give another --kept")
    if (folder / METRICS).exists():  # it was stopped half way
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


def what_came_of(run: DiagnosedRun, stopped: str | None) -> dict[str, Any]:
    """A run's entry in the result file; figures of the series to six digits."""
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


def made() -> dict[str, str]:
    """Where and when, for a result file."""
    versions = {**environment(), "ml_dtypes": package_version("ml_dtypes")}
    return {"date": datetime.date.today().isoformat(), "processor": processor(), **versions}


def main() -> int:
    """Train what is not kept, write results and pictures, fill the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, default=Path("runs/performance"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=COMPARED + LOOKED_INTO, default=COMPARED + LOOKED_INTO)
    options = parser.parse_args()
    try:
        require_plots()
        for name in options.only:
            (compared if name in COMPARED else looked_into)(name, options.kept)
    except UserError as error:
        print(f"performance_report: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the next run")
        return 130
    return fill.main()


if __name__ == "__main__":
    sys.exit(main())
