"""Table and plot of an experiment: the loss of every variant over its seeds, and its gain over the first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cllm_gpu.experiments.ablation import Experiment, SeedRun, Summary, spread, summarise
from cllm_gpu.report.figure import require_plots, save_figure
from cllm_gpu.report.table import Table

MOST_NAMED = 10
"""With more variants, the plot has no legend: the axis of the gains names them."""


def experiment_table(experiment: Experiment, runs: Sequence[SeedRun]) -> Table:
    """A table with a row per variant."""
    rows = tuple(_row(summary) for summary in summarise(experiment, runs))
    first = experiment.changes[0][0]
    several = len(experiment.seeds) > 1
    notes = [
        "Loss: validation loss after the last step, nats per token"
        + (f", mean over seeds {', '.join(map(str, experiment.seeds))} ± standard deviation. " if several else ". ")
        + f"Gain: loss of {first} minus the variant's, seed by seed. "
        "Step: median time of a training step; in brackets its ratio to the first row's."
    ]
    notes += [f"{run.variant}, seed {run.seed}: {run.stopped}" for run in runs if run.stopped]
    header = ("variant", "parameters", "loss", "gain", "least gain", "step")
    return Table(experiment.title, header, rows, notes=tuple(notes))


def _row(summary: Summary) -> tuple[str, ...]:
    return (
        summary.variant,
        f"{summary.parameters:,}",
        _with_spread(summary.losses, ".4f"),
        _with_spread(summary.gains, "+.4f"),
        f"{min(summary.gains):+.4f}",
        f"{1000 * summary.step_seconds:.1f} ms ({summary.step_ratio:.2f}×)",
    )


def _with_spread(values: Sequence[float], form: str) -> str:
    mean = float(np.mean(values))
    if len(values) < 2 or not math.isfinite(mean):
        return format(mean, form)
    return f"{mean:{form}} ± {spread(values):.4f}"


def experiment_data(experiment: Experiment, runs: Sequence[SeedRun]) -> dict[str, Any]:
    """The results as plain data, with the evaluations and scalars of every run."""
    return {
        "title": experiment.title,
        "seeds": list(experiment.seeds),
        "summaries": [dataclasses.asdict(summary) for summary in summarise(experiment, runs)],
        "runs": [dataclasses.asdict(run) for run in runs],
    }


def plot_experiment(experiment: Experiment, runs: Sequence[SeedRun], path: Path) -> None:
    """Plot validation loss over steps, a line per variant (mean, with a band from minimum to maximum), and gains by
    seed.

    Raises UserError without matplotlib, or if the file cannot be written.
    """
    figure = require_plots()(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    summaries = summarise(experiment, runs)
    colours = _colours(len(summaries))
    for number, summary in enumerate(summaries):
        curves = [run for run in runs if run.variant == summary.variant and run.points]
        if not curves:
            continue
        steps = [point.step for point in curves[0].points]
        losses = np.array([[p.loss for p in run.points] for run in curves if len(run.points) == len(steps)])
        colour = colours[number % len(colours)]
        line = "--" if number == 0 else "-"
        left.plot(steps, losses.mean(axis=0), line, color=colour, label=summary.variant, linewidth=1.6)
        left.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        right.plot(summary.gains, [number] * len(summary.gains), "o", color=colour, alpha=0.6)
        right.plot([summary.gain], [number], "|", color=colour, markersize=22, markeredgewidth=2)
    left.set_xlabel("steps")
    left.set_ylabel("validation loss (nats/token)")
    left.set_ylim(*_loss_limits(runs))
    if len(summaries) <= MOST_NAMED:
        left.legend(frameon=False)
    else:
        left.set_title("colours as on the right", fontsize=10)
    right.axvline(0.0, color="0.4", linestyle=":", linewidth=1)
    right.set_yticks(range(len(summaries)), [summary.variant for summary in summaries])
    right.invert_yaxis()
    right.set_xlabel(f"better than {summaries[0].variant}\n(nats/token): a dot for each seed, a bar at the mean")
    right.locator_params(axis="x", nbins=5)
    figure.suptitle(experiment.title)
    save_figure(figure, path)


def _colours(variants: int) -> Sequence[Any]:
    """A colour per variant, up to 20; with more than 10 variants, consecutive ones have shades of the same colour."""
    from matplotlib import colormaps

    chosen: Any = colormaps["tab10" if variants <= 10 else "tab20"]
    return chosen.colors


def _loss_limits(runs: Sequence[SeedRun]) -> tuple[float, float]:
    """Limits of the loss axis that hold the last two thirds of all runs."""
    late = [point.loss for run in runs for point in run.points[len(run.points) // 3 :] if math.isfinite(point.loss)]
    if not late:
        return 0.0, 1.0
    margin = 0.05 * (max(late) - min(late)) or 0.1
    return min(late) - margin, max(late) + margin
