"""Finished runs: reads the contents of run folders, makes tables of several runs, and plots their curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm_gpu import config as configuration
from cllm_gpu.config import Config, load_toml
from cllm_gpu.report.figure import require_plots, save_figure
from cllm_gpu.report.table import NONE, Table, number_or_dash
from cllm_gpu.training.metrics import read_metrics
from cllm_gpu.training.run_folder import CONFIGURATION, METRICS, load_plan
from cllm_gpu.utils.errors import UserError

CARD_FIGURES = {"mfu": ("MFU", ".1%"), "watts": ("W", ".0f"), "joules_per_token": ("J/token", ".3g")}
"""Figures recorded only on a GPU: name in a step's record → title and format in a table."""


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run folder."""

    name: str
    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    samples: tuple[dict[str, Any], ...] = ()
    """Records with "step", "prompt" and "text"."""
    plan: dict[str, int] = field(default_factory=dict)
    """Planned memory in bytes; empty if the folder has no plan."""
    config: Config | None = None

    def series(self, kind: str, value: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of the field `value` of the "steps" or "evaluations"; for a plot."""
        records = self.steps if kind == "steps" else self.evaluations
        pairs = [(r["step"], r[value]) for r in records if r.get(value) is not None and math.isfinite(r[value])]
        return [float(step) for step, _ in pairs], [float(y) for _, y in pairs]


def read_run(path: Path) -> RunRecord:
    """Read a run, given by its folder or its metrics.jsonl. Raises UserError if it has no training steps."""
    file = path / METRICS if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise UserError(f"no training ran in {path}, so it has nothing to report; name a run that was trained")
    records = read_metrics(file)
    steps = tuple(r for r in records if r.get("kind") == "step")
    if not steps:
        raise UserError(f"{file} holds no step of a run; train one with `cllm-gpu train`")
    folder = path if path.is_dir() else path.parent
    settings = folder / CONFIGURATION
    return RunRecord(
        folder.name or str(folder),
        steps,
        tuple(r for r in records if r.get("kind") == "evaluation"),
        tuple(r for r in records if r.get("kind") == "sample"),
        load_plan(folder),
        load_toml(settings) if settings.is_file() else None,
    )


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """`read_run` for each path; runs of the same name are renamed to their paths."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=str(path)) if names.count(run.name) > 1 else run
        for run, path in zip(runs, paths, strict=True)
    ]


def runs_table(runs: Sequence[RunRecord]) -> Table:
    """A table with a row per run: progress, losses, speed, and MFU and power if any run has them."""
    summaries = [run_summary(run) for run in runs]
    added = {name: form for name, form in CARD_FIGURES.items() if any(s[name] is not None for s in summaries)}
    return Table(
        title="Runs",
        header=("run", "steps", "tokens", "training loss", "best validation loss", "at step", "bits per byte",
                "tokens/s", "skipped", *(title for title, _ in added.values())),
        rows=tuple(
            (*_run_row(s), *(number_or_dash(s[name], form) for name, (_, form) in added.items())) for s in summaries
        ),
        notes=(f"Training loss is smoothed; tokens/s{''.join(', ' + title for title, _ in added.values())}: the median "
               "over the steps.",),
    )  # fmt: skip


def differences_table(runs: Sequence[RunRecord]) -> Table:
    """A table with a row per setting in which the runs' configurations differ, except for the output folder."""
    known = [(run.name, _settings(run.config)) for run in runs if run.config is not None]
    names = dict.fromkeys(name for _, settings in known for name in settings)
    rows = [(name, *(settings.get(name, NONE) for _, settings in known)) for name in names]
    return Table(
        title="Differences in configuration",
        header=("setting", *(name for name, _ in known)),
        rows=tuple(row for row in rows if len(set(row[1:])) > 1),
    )


def _settings(config: Config) -> dict[str, str]:
    """Dotted name of every setting → its value as text."""
    found = configuration.settings(dataclasses.replace(config, output=None))
    return {name: NONE if value is None else str(value) for name, value in found.items()}


def run_summary(run: RunRecord) -> dict[str, Any]:
    """The figures of a run's row in the table, as plain data."""
    last = run.steps[-1]
    best = min((e for e in run.evaluations if math.isfinite(e["loss"])), key=lambda e: e["loss"], default=None)
    return {
        "name": run.name,
        "steps": last["step"],
        "tokens": last["tokens"],
        "training_loss": last["smoothed_loss"],
        "best_loss": best["loss"] if best else None,
        "best_step": best["step"] if best else None,
        "bits_per_byte": best["bits_per_byte"] if best else None,
        "tokens_per_second": _median(run, "tokens_per_second"),
        "skipped": sum(1 for r in run.steps if r["skipped"] is not None),
        **{name: _median(run, name) for name in CARD_FIGURES},
    }


def _median(run: RunRecord, name: str) -> float | None:
    """The median of a figure over the steps that have it; None if none has."""
    found = sorted(r[name] for r in run.steps if r.get(name) is not None)
    return found[len(found) // 2] if found else None


def _run_row(s: dict[str, Any]) -> tuple[str, ...]:
    return (
        s["name"],
        f"{s['steps']:,}",
        f"{s['tokens']:,}",
        f"{s['training_loss']:.4f}",
        number_or_dash(s["best_loss"], ".4f"),
        number_or_dash(s["best_step"], ",d"),
        number_or_dash(s["bits_per_byte"], ".4f"),
        f"{s['tokens_per_second']:,.0f}",
        str(s["skipped"]),
    )


def plot_runs(runs: Sequence[RunRecord], path: Path) -> None:
    """Plot loss, learning rate and gradient norm over the steps to a PNG file.

    Raises UserError without matplotlib, or if the file cannot be written.
    """
    figure = require_plots()(figsize=(11, 7), layout="constrained")
    axes: Mapping[str, Any] = figure.subplot_mosaic([["loss", "loss"], ["rate", "gradient"]])
    for number, run in enumerate(runs):
        colour = f"C{number}"
        axes["loss"].plot(*run.series("steps", "loss"), color=colour, alpha=0.2, linewidth=0.8)
        axes["loss"].plot(*run.series("steps", "smoothed_loss"), color=colour, label=f"{run.name}, training (smoothed)")
        if run.evaluations:
            steps, losses = run.series("evaluations", "loss")
            axes["loss"].plot(steps, losses, "o--", color=colour, markersize=4, label=f"{run.name}, validation")
        axes["rate"].plot(*run.series("steps", "rate"), color=colour)
        axes["gradient"].plot(*run.series("steps", "gradient_norm"), color=colour, linewidth=0.8)
    axes["loss"].set_ylabel("loss (nats/token)")
    axes["rate"].set_ylabel("learning rate")
    axes["gradient"].set_ylabel("gradient norm before clipping")
    axes["gradient"].set_yscale("log")
    axes["loss"].legend(frameon=False)
    for part in axes.values():
        part.set_xlabel("steps")
    save_figure(figure, path)
