"""cllm-gpu compare"""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.cli import interrupted_status
from cllm_gpu.cli.config_flags import base_configuration, early_flags, open_data
from cllm_gpu.cli.parsing import Command, QuietOption
from cllm_gpu.cli.progress import ConsoleReporter, terminal
from cllm_gpu.config import Config, as_dict
from cllm_gpu.data import Dataset
from cllm_gpu.experiments.ablation import (
    RUNS,
    Experiment,
    SeedRun,
    checked_seeds,
    load_experiment,
    run_experiment,
    run_variant,
)
from cllm_gpu.experiments.optimizer_comparison import OptimizerName, Run, ScheduleName, compare, default_settings
from cllm_gpu.experiments.run_in_memory import run_in_memory
from cllm_gpu.report.ablation import experiment_data, experiment_table, plot_experiment
from cllm_gpu.report.comparison import comparison_table, plot_comparison
from cllm_gpu.report.figure import require_plots
from cllm_gpu.report.table import print_table, write_table
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.versions import environment


@dataclass(frozen=True)
class CompareOptions(QuietOption):
    """Compare optimizers and schedules over learning rates, or variants of a model."""

    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    config: Path | None = None
    """TOML file with the sections and names of the flags below."""
    experiment: Path | None = None
    """TOML file of variants to train from several seeds instead, such as experiments/crystalline_bytes.toml; finished
    runs are kept, so the same command resumes an interrupted experiment."""
    seeds: tuple[int, ...] = ()
    """Seeds of the experiment (none: those in its file)."""
    optimizers: tuple[OptimizerName, ...] = ("sgd", "adam", "adamw")
    """Optimizers to compare; the first is the baseline."""
    schedules: tuple[ScheduleName, ...] = ()
    """Also compare AdamW with these schedules."""
    picture: bool = False
    """Draw the curves too; needs the extra `plots`."""


COMMAND = Command(
    "compare",
    CompareOptions,
    examples="""
    # SGD, Adam and AdamW, each over a grid of learning rates
    cllm-gpu compare --model.size tiny --training.steps 400 --output optimizers
    # AdamW with three schedules, on your own text
    cllm-gpu compare --data.source book.txt --model.size tiny --training.steps 5 \\
      --optimizers adamw --schedules constant cosine wsd
    # the variants of an experiment, from one seed
    cllm-gpu compare --experiment experiments/crystalline_bytes.toml --seeds 1
    """,
)


def main(arguments: list[str]) -> int:
    """Run the comparison. Returns exit status 0, or 130 if interrupted."""
    named = early_flags(arguments).experiment
    experiment = load_experiment(named) if named else None
    base = experiment.base if experiment else base_configuration(arguments)
    options = COMMAND.parse(arguments, CompareOptions(base))
    if experiment and options.config:
        raise UserError("--config and --experiment are both given; the experiment's file has the configuration too")
    if options.seeds and experiment is None:
        raise UserError("--seeds requires --experiment; without one, use --training.seed")
    if options.seeds and experiment is not None:
        experiment = dataclasses.replace(experiment, seeds=checked_seeds(options.seeds, "--seeds"))
    if options.settings.training.minutes is not None:
        raise UserError("training.minutes is for train, whose run can be resumed; leave it out")
    if options.picture:
        require_plots()
    return _experiment(experiment, options) if experiment else _optimizers(options)


def _open(config: Config, *, quiet: bool) -> tuple[Backend, ConsoleReporter, Dataset]:
    backend = get_backend(config.backend, workers=config.training.workers, precision=config.precision)
    display = ConsoleReporter(terminal(quiet=quiet), config.training.steps, backend.memory_held)
    display.message(backend.description)
    return backend, display, open_data(config, display)


def _provenance(backend: Backend) -> dict[str, str]:
    """Date, backend and versions, for a result file."""
    return {"date": datetime.date.today().isoformat(), "backend": backend.description, **environment()}


def _optimizers(options: CompareOptions) -> int:
    config = options.settings
    if not options.optimizers:
        raise UserError("--optimizers is empty; give at least one of sgd, adam, adamw")
    folder = config.output or Path("runs/comparison")
    settings = default_settings(config, optimizers=options.optimizers, schedules=options.schedules)
    backend, display, dataset = _open(config, quiet=options.quiet)
    done: list[Run] = []

    def report(run: Run) -> None:
        done.append(run)
        ended = f" ({run.curve.stopped})" if run.curve.stopped else ""
        display.message(f"{len(done):3d}. {run.setting.name}: best loss {run.best_loss:.4f}{ended}")

    display.message(f"{len(settings)} runs of {config.training.steps} steps, and more where the best rate is at an end")
    found = compare(
        settings, lambda c: run_in_memory(c, backend, dataset), baseline=options.optimizers[0], report=report
    )
    table = comparison_table(found)
    print_table(table, terminal(quiet=options.quiet))
    written = [*write_table(table, {"made": _provenance(backend), **found.as_dict()}, folder, "comparison")]
    if options.picture:
        written.append(folder / "comparison.png")
        plot_comparison(found, written[-1])
    display.message("written: " + ", ".join(map(str, written)))
    return 0


def _experiment(experiment: Experiment, options: CompareOptions) -> int:
    config = options.settings
    assert options.experiment is not None
    folder = config.output or Path("runs") / options.experiment.stem
    experiment.variants(config)  # report an invalid combination of flags before anything is opened
    backend, display, dataset = _open(config, quiet=options.quiet)
    # kept runs are identified by the actual backend and workers, like a resumed run
    config = dataclasses.replace(
        config, backend=backend.name, training=dataclasses.replace(config.training, workers=backend.workers)
    )
    total = len(experiment.seeds) * len(experiment.changes)
    display.message(f"{total} runs of {config.training.steps} steps; kept in {folder / RUNS}")
    done: list[SeedRun] = []

    def report(run: SeedRun, known: bool) -> None:
        done.append(run)
        ended = f" ({run.stopped})" if run.stopped else " (kept from before)" if known else ""
        display.message(f"{len(done):3d}/{total} {run.variant}, seed {run.seed}: loss {run.loss:.4f}{ended}")

    try:
        runs = run_experiment(experiment, config, folder, lambda n, c: run_variant(n, c, backend, dataset), report)
    except KeyboardInterrupt as interrupt:
        display.message(f"stopped after {len(done)} of {total} runs; the same command goes on with the next")
        return interrupted_status(getattr(interrupt, "number", None))
    table = experiment_table(experiment, runs)
    print_table(table, terminal(quiet=options.quiet))
    name = options.experiment.stem
    data = {
        "made": _provenance(backend),
        "config": as_dict(dataclasses.replace(config, output=None)),
        **experiment_data(experiment, runs),
    }
    written = [*write_table(table, data, folder, name)]
    if options.picture:
        written.append(folder / f"{name}.png")
        plot_experiment(experiment, runs, written[-1])
    display.message("written: " + ", ".join(map(str, written)))
    return 0
