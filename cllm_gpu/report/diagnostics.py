"""Table and plot of the diagnostics recorded with `training.diagnose_every`: gradients, updates, activations by layer.

Parameters are grouped into the embeddings, each block, and the final norm with an untied head.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm_gpu.report.figure import require_plots, save_figure
from cllm_gpu.report.runs import RunRecord, read_runs
from cllm_gpu.report.table import NONE, Table
from cllm_gpu.training.diagnostics import DIAGNOSTICS, largest
from cllm_gpu.training.metrics import clipped, read_metrics
from cllm_gpu.utils.errors import UserError

EMBEDDINGS, LAST = "embeddings", "final norm"
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "residual stream": ("attention_residual", "mlp_residual", "final_residual"),
    "q, k, v": ("qkv",),
    "scores": ("lse",),
    "attention": ("attended",),
    "MLP": ("hidden",),
    "logits": ("logits",),
}
"""Label in the table and plot → recorded kinds of activations; `scores`: log-sum-exp of a row's attention scores."""
GRADIENTS = ("gradient norm", "update / weight", "zero gradients")
OF_MODEL = ("final_residual", "logits")
"""Kinds that do not belong to a block."""
TITLES = ("gradient norm before clipping", "update / weight", "largest |activation|, over all layers")
MOST_NAMED = 8
"""With more blocks, the legend of the plot lists only the first and the last."""


@dataclass(frozen=True)
class DiagnosedRun:
    """A run and its diagnostics records ("looks"), in order."""

    run: RunRecord
    looks: tuple[dict[str, Any], ...]

    @property
    def steps(self) -> list[int]:
        """Steps of the looks."""
        return [look["step"] for look in self.looks]

    @property
    def skipped(self) -> int:
        """Number of skipped steps in the whole run."""
        return sum(1 for record in self.run.steps if record["skipped"] is not None)

    @property
    def clipped(self) -> int | None:
        """Number of steps in the whole run whose gradient was clipped; None if the run has no configuration."""
        if self.run.config is None:
            return None
        return sum(clipped(record, self.run.config.optimizer.clip_norm) for record in self.run.steps)


def read_diagnosed(paths: Sequence[Path]) -> list[DiagnosedRun]:
    """Read runs with their looks. Raises UserError for a run without diagnostics."""
    found = []
    for path, run in zip(paths, read_runs(paths), strict=True):
        file = (path if path.is_dir() else path.parent) / DIAGNOSTICS
        looks = tuple(read_metrics(file)) if file.is_file() else ()
        if not looks:
            raise UserError(f"{file.parent} has no diagnostics; train with, for example, --training.diagnose-every 50")
        found.append(DiagnosedRun(run, looks))
    return found


# ---- from records to layers


def layer_of(parameter: str) -> str:
    """The layer of a parameter: "embeddings", "block 0", …, "final norm" (including an untied head)."""
    if parameter.startswith("blocks."):
        return f"block {parameter.split('.')[1]}"
    return EMBEDDINGS if parameter in ("token_embedding", "position_embedding", "lattice_points") else LAST


def layers(look: Mapping[str, Any]) -> list[str]:
    """All layers, in order of the forward."""
    blocks = {layer_of(name) for name in look["parameters"]} - {EMBEDDINGS, LAST}
    return [EMBEDDINGS, *sorted(blocks, key=lambda name: int(name.split()[1])), LAST]


def gradient_norm(look: Mapping[str, Any], layer: str) -> float:
    """Euclidean norm of a layer's gradient before clipping."""
    return _norm(look, layer, "gradient")


def update_ratio(look: Mapping[str, Any], layer: str) -> float:
    """Norm of a layer's update divided by the norm of its weights; NaN if all weights are 0."""
    weight = _norm(look, layer, "weight")
    return _norm(look, layer, "update") / weight if weight else math.nan


def zero_share(look: Mapping[str, Any], layer: str) -> float:
    """Fraction of the elements of a layer's gradient that are 0 or subnormal."""
    found = [values for name, values in look["parameters"].items() if layer_of(name) == layer]
    return sum(v["zeros"] + v["subnormals"] for v in found) / sum(v["size"] for v in found)


def _norm(look: Mapping[str, Any], layer: str, of: str) -> float:
    norms = [values[of] for name, values in look["parameters"].items() if layer_of(name) == layer]
    return math.sqrt(math.fsum(norm * norm for norm in norms)) if all(map(math.isfinite, norms)) else math.nan


def activations_of(look: Mapping[str, Any], kind: str, layer: str) -> list[float]:
    """The largest |x| of each array of a kind of `ACTIVATIONS` in a layer; empty if the layer has no such array."""
    values: list[float] = []
    for array in ACTIVATIONS[kind]:
        found = look["activations"].get(array, [])  # a model of other layers has other arrays
        if array in OF_MODEL:
            values += found if layer == LAST else []
        elif found and layer.startswith("block "):
            values.append(found[int(layer.split()[1])])
    return values


def series(run: DiagnosedRun) -> dict[str, Any]:
    """The data of the plot: steps, and by layer or kind a value for each step."""
    names = layers(run.looks[0])
    return {
        "steps": run.steps,
        "gradient_norm": {name: [gradient_norm(look, name) for look in run.looks] for name in names},
        "update_ratio": {name: [update_ratio(look, name) for look in run.looks] for name in names},
        "zero_share": {name: [zero_share(look, name) for look in run.looks] for name in names},
        "largest": {
            kind: {
                name: [largest(activations_of(look, kind, name)) for look in run.looks]
                for name in names
                if activations_of(run.looks[0], kind, name)
            }
            for kind in ACTIVATIONS
        },
        "skipped": run.skipped,
        "clipped": run.clipped,
    }


# ---- table


def diagnostics_tables(run: DiagnosedRun) -> tuple[Table, Table]:
    """Tables of gradients and updates, and of the largest activations, with a row per layer; each fits 80 columns."""
    found = series(run)
    rows = [layer_row(found, name) for name in found["gradient_norm"]]
    cut = 1 + len(GRADIENTS)
    clips = "" if run.clipped is None else f"{run.clipped:,} clipped, "
    counted = f"{len(run.looks)} looks at {run.run.steps[-1]['step']:,} steps, {clips}{run.skipped:,} skipped."
    return (
        Table(
            title=f"{run.run.name}: gradients by layer",
            header=("layer", *GRADIENTS),
            rows=tuple(row[:cut] for row in rows),
            notes=(f"{counted} Norms, before clipping, and ratios: the median look; zeros: the most.",),
        ),
        Table(
            title=f"{run.run.name}: largest activations by layer",
            header=("layer", *ACTIVATIONS),
            rows=tuple((row[0], *row[cut:]) for row in rows),
            notes=("Of all looks; scores: log-sum-exp of a row's attention scores.",),
        ),
    )


def layer_row(found: Mapping[str, Any], layer: str) -> tuple[str, ...]:
    """The layer's name, then its cells for GRADIENTS and ACTIVATIONS, from the result of `series`."""
    activations = (_format(highest(found["largest"][kind].get(layer, ())), ".3g") for kind in ACTIVATIONS)
    return (
        layer,
        _format(_median(found["gradient_norm"][layer]), ".3g"),
        _format(_median(found["update_ratio"][layer]), ".2e"),
        _format(highest(found["zero_share"][layer]), ".2%"),
        *activations,
    )


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def highest(values: Iterable[float]) -> float:
    """The largest value that is not NaN; NaN if there is none."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _format(value: float, form: str) -> str:
    return NONE if math.isnan(value) else format(value, form)


# ---- plot


def plot_diagnostics(runs: Sequence[tuple[str, Mapping[str, Any]]], path: Path) -> None:
    """Plot gradient norm and update / weight by layer, and largest activations by kind, with a row per (name, series).

    Raises UserError without matplotlib, or if the file cannot be written.
    """
    figure = require_plots()(figsize=(13, 0.6 + 3.4 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), 3, squeeze=False, sharey="col", sharex=True)
    for (name, found), (gradients, updates, activations) in zip(runs, grid, strict=True):
        _plot_layers(gradients, found, "gradient_norm")
        _plot_layers(updates, found, "update_ratio")
        for kind, by_layer in found["largest"].items():
            if not by_layer:
                continue
            over_layers = [highest(values) for values in zip(*by_layer.values(), strict=True)]
            activations.plot(found["steps"], over_layers, ".-", linewidth=1.2, label=kind)
        gradients.set_ylabel(name)
        for axes in (gradients, updates, activations):
            axes.set_yscale("log")
            axes.grid(alpha=0.2, which="both", linewidth=0.5)
    for axes, title in zip(grid[0], TITLES, strict=True):
        axes.set_title(title, fontsize=11)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    for axes, place in ((grid[0][1], "upper"), (grid[0][2], "lower")):
        figure.legend(*axes.get_legend_handles_labels(), loc=f"outside right {place}", frameon=False, fontsize=9)
    save_figure(figure, path)


def _plot_layers(axes: Any, found: Mapping[str, Any], what: str) -> None:
    """Plot a line per layer: blocks from light to dark, the embeddings dashed, the final norm dotted."""
    from matplotlib import colormaps

    blocks = [name for name in found[what] if name.startswith("block ")]
    for name, values in found[what].items():
        style: dict[str, Any] = {"color": "0.35", "linestyle": "--" if name == EMBEDDINGS else ":"}
        if name in blocks:
            place = blocks.index(name) / max(1, len(blocks) - 1)
            style = {"color": colormaps["viridis_r"](0.15 + 0.8 * place)}
        shown = name not in blocks or len(blocks) <= MOST_NAMED or name in (blocks[0], blocks[-1])
        axes.plot(found["steps"], values, linewidth=1.3, label=name if shown else None, **style)
