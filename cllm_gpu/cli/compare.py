"""cllm-gpu compare"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cllm_gpu.backend import get_backend
from cllm_gpu.cli.configured import base_configuration, open_data
from cllm_gpu.cli.parsing import parse
from cllm_gpu.comparison import OptimizerName, Run, ScheduleName, compare, default_settings, run_setting
from cllm_gpu.config import Config
from cllm_gpu.display import Display
from cllm_gpu.errors import UserError
from cllm_gpu.reporting import comparison_sheet, plot_comparison, print_sheet, require_plots, write_sheet
from cllm_gpu.versions import environment


@dataclass(frozen=True)
class CompareOptions:
    """Train one model from one seed with several optimizers and schedules, each over a grid of rates, and compare."""

    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    config: Path | None = None
    """TOML file with the sections and names of the flags below."""
    optimizers: tuple[OptimizerName, ...] = ("sgd", "adam", "adamw")
    """Optimizers to compare; the first is what the others are measured against."""
    schedules: tuple[ScheduleName, ...] = ()
    """Also AdamW under these schedules."""
    picture: bool = False
    """Draw the curves too; needs the extra `plots`."""


def main(arguments: list[str]) -> int:
    """Compare; exit status 0."""
    defaults = CompareOptions(base_configuration(arguments))
    options = parse(CompareOptions, arguments, command="compare", default=defaults)
    config = options.settings
    if not options.optimizers:
        raise UserError("--optimizers names none; give at least one of sgd, adam, adamw")
    if options.picture:
        require_plots()
    folder = config.output or Path("runs/comparison")
    settings = default_settings(config, optimizers=options.optimizers, schedules=options.schedules)
    backend = get_backend(config.backend, workers=config.training.workers)
    display = Display(config.training.steps, backend.memory_held)
    display.message(backend.description)
    dataset = open_data(config, display)
    done: list[Run] = []

    def report(run: Run) -> None:
        done.append(run)
        ended = f" ({run.curve.stopped})" if run.curve.stopped else ""
        display.message(f"{len(done):3d}. {run.setting.name}: best loss {run.best_loss:.4f}{ended}")

    display.message(f"{len(settings)} runs of {config.training.steps} steps, and more where the best rate is at an end")
    found = compare(settings, lambda c: run_setting(c, backend, dataset), baseline=options.optimizers[0], report=report)
    sheet = comparison_sheet(found)
    print_sheet(sheet)
    made = {"date": datetime.date.today().isoformat(), "backend": backend.description, **environment()}
    written = [*write_sheet(sheet, {"made": made, **found.as_dict()}, folder, "comparison")]
    if options.picture:
        written.append(folder / "comparison.png")
        plot_comparison(found, written[-1])
    display.message("written: " + ", ".join(map(str, written)))
    return 0
