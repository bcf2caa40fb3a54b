"""What a person reads after the work: tables for the terminal, Markdown and JSON for files, pictures of curves.

`sheets.py` renders the tables. Pictures need matplotlib (the extra `plots`), which is imported only when one is drawn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cllm_gpu.config import Config, as_dict, load_toml
from cllm_gpu.report.table import Sheet, print_sheet
from cllm_gpu.training.metrics import read_metrics
from cllm_gpu.training.run_folder import CONFIGURATION, METRICS, saved_plan
from cllm_gpu.utils import exact_json
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors, write_atomically

if TYPE_CHECKING:  # a table of one thing does not load what makes another
    from cllm_gpu.experiments.optimizer_comparison import Comparison, Row
    from cllm_gpu.model.gradcheck import GroupCheck

NONE = "–"
CARD_FIGURES = {"mfu": ("MFU", ".1%"), "watts": ("W", ".0f"), "joules_per_token": ("J/token", ".3g")}
"""What only a card's runs have of a step: name → title and form in a table."""


def write_sheet(sheet: Sheet, data: Any, folder: Path, name: str) -> tuple[Path, Path]:
    """Write folder/name.md and, from plain `data`, folder/name.json; their paths. UserError when that cannot be."""
    markdown, json = folder / f"{name}.md", folder / f"{name}.json"
    write_atomically(markdown, sheet.markdown())
    write_json(json, data)
    return markdown, json


def write_json(path: Path, data: Any) -> None:
    """Write plain `data` as JSON. UserError when the place cannot be written."""
    write_atomically(path, exact_json.dumps(data, indent=1) + "\n")


# ---- the sheets


def print_checks(checks: Sequence[GroupCheck], console: Console | None = None) -> None:
    """Show the table of a gradient check."""
    print_sheet(gradient_sheet(checks), console)


def gradient_sheet(checks: Sequence[GroupCheck]) -> Sheet:
    """Every parameter's worst relative error beside the bound."""
    failed = [check for check in checks if not check.passed]
    worst = max((c.relative_error for c in checks), key=lambda error: math.inf if math.isnan(error) else error)
    verdict = f"{len(failed)} of {len(checks)} groups FAILED" if failed else f"all {len(checks)} groups passed"
    return Sheet(
        title="Gradient check, float64: analytic against numerical directional derivatives",
        header=("parameter", "size", "analytic", "numerical", "relative error", "result"),
        rows=tuple(
            (
                check.name,
                f"{check.size:,}",
                f"{check.analytic:.9e}",
                f"{check.numerical:.9e}",
                f"{check.relative_error:.1e}",
                "pass" if check.passed else "FAIL",
            )
            for check in checks
        ),
        bad_rows=frozenset(number for number, check in enumerate(checks) if not check.passed),
        spare_columns=(3, 2, 1),
        notes=(f"{verdict}; largest relative error {worst:.1e}, bound {checks[0].bound:.0e}.",),
    )


def gradient_data(checks: Sequence[GroupCheck]) -> dict[str, Any]:
    """The same as plain data."""
    return {"passed": all(check.passed for check in checks), "groups": [check.as_dict() for check in checks]}


def comparison_sheet(comparison: Comparison) -> Sheet:
    """A row for every family: its tuned rate, its loss, and how soon it reached the baseline's best."""
    notes = [
        f"Target: {comparison.target:.4f} nats/token, the lowest validation loss of {comparison.baseline} over its "
        "rates. Steps and seconds: to the first evaluation at or below it, by the rate with the lowest loss; fastest: "
        f"by whichever rate of the family got there first. Sooner: {comparison.baseline}'s over the family's."
    ]
    notes += [
        f"The best rate of {row.family} is at the end of what was tried: a better one may lie beyond."
        for row in comparison.rows
        if row.at_edge
    ]
    notes += [f"{run.setting.name}: {run.curve.stopped}" for run in comparison.runs if run.curve.stopped]
    return Sheet(
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
        _number(row.steps, ",d"),
        _times(row.steps_sooner),
        _number(row.seconds, ".1f"),
        _times(row.seconds_sooner),
        _number(row.fastest_steps, ",d"),
        _times(row.fastest_sooner),
    )


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


# ---- finished runs


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder keeps."""

    name: str
    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    samples: tuple[dict[str, Any], ...] = ()
    """With "step", "prompt" and "text"."""
    plan: dict[str, int] = field(default_factory=dict)
    """Planned memory in bytes; empty when the folder has none."""
    config: Config | None = None

    def series(self, kind: str, value: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of the "steps" or "evaluations"; for a picture."""
        records = self.steps if kind == "steps" else self.evaluations
        pairs = [(r["step"], r[value]) for r in records if r.get(value) is not None and math.isfinite(r[value])]
        return [float(step) for step, _ in pairs], [float(y) for _, y in pairs]


def read_run(path: Path) -> RunRecord:
    """What a run's folder keeps, or the folder of a metrics.jsonl. UserError when it holds no step of a run."""
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
        saved_plan(folder),
        load_toml(settings) if settings.is_file() else None,
    )


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """`read_run` for each; runs of the same name are told apart by their paths."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=str(path)) if names.count(run.name) > 1 else run
        for run, path in zip(runs, paths, strict=True)
    ]


def runs_sheet(runs: Sequence[RunRecord]) -> Sheet:
    """A row for every run: how far it came, its losses, its speed; MFU and power where one of them has them."""
    summaries = [run_summary(run) for run in runs]
    added = {name: form for name, form in CARD_FIGURES.items() if any(s[name] is not None for s in summaries)}
    return Sheet(
        title="Runs",
        header=("run", "steps", "tokens", "training loss", "best validation loss", "at step", "bits per byte",
                "tokens/s", "skipped", *(title for title, _ in added.values())),
        rows=tuple(
            (*_run_row(s), *(_number(s[name], form) for name, (_, form) in added.items())) for s in summaries
        ),
        notes=(f"Training loss is smoothed; tokens/s{''.join(', ' + title for title, _ in added.values())}: the median "
               "over the steps.",),
    )  # fmt: skip


def differences_sheet(runs: Sequence[RunRecord]) -> Sheet:
    """A row for every setting in which runs that keep a configuration differ; where they lie is left out."""
    known = [(run.name, _settings(run.config)) for run in runs if run.config is not None]
    names = dict.fromkeys(name for _, settings in known for name in settings)
    rows = [(name, *(settings.get(name, NONE) for _, settings in known)) for name in names]
    return Sheet(
        title="Differences in configuration",
        header=("setting", *(name for name, _ in known)),
        rows=tuple(row for row in rows if len(set(row[1:])) > 1),
    )


def _settings(config: Config) -> dict[str, str]:
    """Every setting as text under its dotted name."""
    found: dict[str, str] = {}

    def collect(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = NONE if value is None else str(value)

    collect(as_dict(dataclasses.replace(config, output=None)), "")
    return found


def run_summary(run: RunRecord) -> dict[str, Any]:
    """The figures of a run's row, as plain data."""
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
    """The middle one of a figure over the steps that have it; None where none has."""
    found = sorted(r[name] for r in run.steps if r.get(name) is not None)
    return found[len(found) // 2] if found else None


def _run_row(s: dict[str, Any]) -> tuple[str, ...]:
    return (
        s["name"],
        f"{s['steps']:,}",
        f"{s['tokens']:,}",
        f"{s['training_loss']:.4f}",
        _number(s["best_loss"], ".4f"),
        _number(s["best_step"], ",d"),
        _number(s["bits_per_byte"], ".4f"),
        f"{s['tokens_per_second']:,.0f}",
        str(s["skipped"]),
    )


# ---- pictures


def require_plots() -> Any:
    """matplotlib's Figure class. UserError, one line, where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'cllm-gpu[plots]'") from None
    return Figure


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Validation loss over steps and over seconds as a PNG: a colour per family, its other rates faint.

    UserError without matplotlib, or where the file cannot be written.
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
    """Keep what the tuned runs do in view; a run that diverges may leave the picture."""
    losses = [p.loss for run in comparison.tuned() for p in run.curve.points if math.isfinite(p.loss)]
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def plot_runs(runs: Sequence[RunRecord], path: Path) -> None:
    """Loss, learning rate and gradient norm of runs over their steps, as a PNG. UserError as in plot_comparison."""
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


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG or SVG, by the name's ending. No pyplot: no window system, nothing outlives the call."""
    with clear_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, format="svg" if path.suffix == ".svg" else "png")
