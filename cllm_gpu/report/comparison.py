"""Table and plot of an optimizer comparison: how soon each family reached the baseline's best loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cllm_gpu.experiments.optimizer_comparison import Comparison, Row
from cllm_gpu.report.figure import require_plots, save_figure
from cllm_gpu.report.table import NONE, Table, number_or_dash


def comparison_table(comparison: Comparison) -> Table:
    """A table with a row per family: its tuned rate, its loss, and its speedup over the baseline."""
    notes = [
        f"Target: {comparison.target:.4f} nats/token, the lowest validation loss of {comparison.baseline} over its "
        "rates. Steps and seconds: to the first evaluation at or below it, by the rate with the lowest loss; fastest: "
        f"by whichever rate of the family got there first. Sooner: {comparison.baseline}'s over the family's."
    ]
    notes += [
        f"The best rate of {row.family} is at the end of the grid: a better one may exist beyond it."
        for row in comparison.rows
        if row.at_edge
    ]
    notes += [f"{run.setting.name}: {run.curve.stopped}" for run in comparison.runs if run.curve.stopped]
    return Table(
        title="Comparison of optimizers and schedules",
        header=("family", "rates", "best rate", "lowest loss", "steps", "sooner", "seconds", "sooner", "fastest",
                "sooner"),
        rows=tuple(_comparison_row(row) for row in comparison.rows),
        notes=tuple(notes),
    )  # fmt: skip


def _comparison_row(row: Row) -> tuple[str, ...]:
    return (
        row.family,
        str(row.runs),
        f"{row.rate:g}",
        f"{row.best_loss:.4f}",
        number_or_dash(row.steps, ",d"),
        _times(row.steps_sooner),
        number_or_dash(row.seconds, ".1f"),
        _times(row.seconds_sooner),
        number_or_dash(row.fastest_steps, ",d"),
        _times(row.fastest_sooner),
    )


def _times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Plot validation loss over steps and over seconds to a PNG file: a colour per family, its other rates faint.

    Raises UserError without matplotlib, or if the file cannot be written.
    """
    figure = require_plots()(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colours = {row.family: f"C{number}" for number, row in enumerate(comparison.rows)}
    tuned = {run.setting.name for run in comparison.tuned()}
    for run in sorted(comparison.runs, key=lambda r: r.setting.name in tuned):  # the tuned ones on top
        points = [p for p in run.curve.points if math.isfinite(p.loss)]
        best = run.setting.name in tuned
        style = {"color": colours[run.setting.family], "alpha": 1.0 if best else 0.25, "linewidth": 2 if best else 1}
        for axes, x in ((left, [p.step for p in points]), (right, [p.seconds for p in points])):
            axes.plot(x, [p.loss for p in points], label=run.setting.name if best else None, **style)
    for axes, unit in ((left, "steps"), (right, "seconds of training")):
        axes.axhline(comparison.target, color="0.4", linestyle=":", linewidth=1)
        axes.set_xlabel(unit)
    left.set_ylabel("validation loss (nats/token)")
    _limit_losses(left, comparison)
    right.legend(frameon=False, title=f"dotted: best of {comparison.baseline}")
    save_figure(figure, path)


def _limit_losses(axes: Any, comparison: Comparison) -> None:
    """Set the loss axis to the range of the tuned runs; diverging runs may leave the plot."""
    losses = [p.loss for run in comparison.tuned() for p in run.curve.points if math.isfinite(p.loss)]
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
