"""The tables of docs/performance.md, from the committed result files; used by fill.py."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.paths import RESULTS
from cllm_gpu.report.diagnostics import ACTIVATIONS, GRADIENTS, highest, layer_row
from cllm_gpu.utils import exact_json

WARM_UP = ", warm-up"


def load(name: str) -> Any:
    """Read a result file as plain data, including infinities and NaNs."""
    return exact_json.loads((RESULTS / f"{name}.json").read_bytes())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table with a left-aligned first column."""
    rule = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in rows)]


def over_seeds(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation (n − 1); the value for one seed; a dash if any value is not finite."""
    if not all(map(math.isfinite, values)):
        return "–"
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def made(found: Mapping[str, Any]) -> str:
    """A sentence with the steps, seeds, machine and date of an experiment."""
    seeds, steps = found["seeds"], found["config"]["training"]["steps"]
    said = f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "one seed"
    return f"{steps} steps, {said}; {found['made']['system']}, {found['made']['date']}."


# ---- optimizers and schedules


def losses(name: str) -> str:
    """A table of every variant's loss, and of its clipped and skipped steps."""
    found = load(name)
    rows = []
    for summary in found["summaries"]:
        runs = [run for run in found["runs"] if run["variant"] == summary["variant"]]
        steps = sum(found["config"]["training"]["steps"] for _ in runs)
        clipped, skipped = (_counted(runs, of) for of in ("clipped", "skipped"))
        share = "–" if clipped is None else f"{clipped / steps:.0%}"
        loss = over_seeds(summary["losses"], ".4f")
        rows.append((summary["variant"], loss, share, "–" if skipped is None else str(skipped)))
    header = ("optimizer, schedule", "validation loss (nats/byte)", "steps clipped", "steps skipped")
    return "\n".join([*table(header, rows), "", made(found)])


def _counted(runs: Sequence[Mapping[str, Any]], of: str) -> int | None:
    counts = [run[of] for run in runs]
    return None if None in counts else sum(counts)


def schedule_effects(name: str) -> str:
    """A table of the separate effects of warmup and decay, seed by seed, with and without the other."""
    found = load(name)
    by_variant = {summary["variant"]: summary["losses"] for summary in found["summaries"]}
    rows = []
    for optimizer in dict.fromkeys(variant.split(",")[0] for variant in by_variant):
        constant, cosine = f"{optimizer}, constant", f"{optimizer}, cosine"
        pairs = (
            (constant, constant + WARM_UP),
            (cosine, cosine + WARM_UP),
            (constant, cosine),
            (constant + WARM_UP, cosine + WARM_UP),
        )
        rows.append((optimizer, *(_gain(by_variant[without], by_variant[having]) for without, having in pairs)))
    header = (
        "", "warm-up, constant rate", "warm-up, cosine decay", "cosine decay, no warm-up", "cosine decay, warm-up"
    )  # fmt: skip
    spoken = "Loss without it minus loss with it, seed by seed; positive: an improvement."
    return "\n".join([*table(header, rows), "", f"{spoken} {made(found)[0].upper()}{made(found)[1:]}"])


def _gain(without: Sequence[float], having: Sequence[float]) -> str:
    return over_seeds([a - b for a, b in zip(without, having, strict=True)], "+.4f")


# ---- diagnostics


def gradient_flow() -> str:
    """A table by layer per run."""
    found = load("gradient_flow")
    lines: list[str] = []
    for run in found["runs"]:
        inside = run["series"]
        header = (run["variant"], *GRADIENTS, *ACTIVATIONS)
        lines += [*table(header, [layer_row(inside, name) for name in inside["gradient_norm"]]), ""]
        lines += [f"Loss {run['loss']:.4f}; {_events(run)}", ""]
    return "\n".join([*lines, _provenance(found)])


def stability() -> str:
    """A row per run: the largest activations over all layers and steps, and clipped and skipped steps."""
    found = load("stability")
    rows = []
    for run in found["runs"]:
        inside = run["series"]
        peaks = [f"{_peak(by_layer):.3g}" for by_layer in inside["largest"].values()]
        zeros = f"{_peak(inside['zero_share']):.2%}"
        loss = "–" if run["loss"] is None else f"{run['loss']:.4f}"
        clipped, skipped = f"{inside['clipped']}", f"{inside['skipped']}"
        rows.append((run["variant"], str(run["steps"]), loss, *peaks, zeros, clipped, skipped))
    header = ("run", "steps", "loss", *ACTIVATIONS, GRADIENTS[-1], "clipped", "skipped")
    stops = [f"{run['variant']}: {_reason(run['stopped'])}." for run in found["runs"] if run["stopped"]]
    return "\n".join([*table(header, rows), "", " ".join([_provenance(found), *stops])])


def _peak(by_layer: Mapping[str, Sequence[float]]) -> float:
    return highest(value for values in by_layer.values() for value in values)


def _events(run: Mapping[str, Any]) -> str:
    return f"{run['series']['clipped']} of {run['steps']} steps clipped, {run['series']['skipped']} skipped."


def _reason(stopped: str) -> str:
    """The reason for a stop, without the advice."""
    return re.sub(r"; the weights are .*", "", stopped)


def _provenance(found: Mapping[str, Any]) -> str:
    runs = found["runs"]
    seeds = {run["seed"] for run in runs}
    said = "one seed" if len(seeds) == 1 else f"seeds {', '.join(map(str, sorted(seeds)))}"
    machine = found["made"]
    return f"{said[0].upper()}{said[1:]}; {machine['processor']}, {machine['system']}, {machine['date']}."


# ---- other results


def kernels() -> str:
    """A sentence on the resources of the CUDA kernels, and one on mutation testing."""
    resources, mutants = load("kernel_resources"), load("mutation")["total"]
    rows = resources["kernels"]
    names = {row["declared"] for row in rows}
    architectures = sorted({row["architecture"] for row in rows}, key=lambda name: int(name.removeprefix("sm_")))
    spilling = {row["declared"] for row in rows if row["spill_bytes"]}
    worst, most = (max(rows, key=lambda row: row[of]) for of in ("spill_bytes", "registers"))
    spills = "no kernel spills registers"
    if spilling:
        size = f"{worst['spill_bytes']} bytes per thread"
        spills = f"{len(spilling)} spill registers on at least one of them, `{worst['declared']}` the most ({size})"
    compiled = f"{len(names)} kernels, including variants, for {', '.join(architectures)}"
    caught = f"the tests catch {mutants['caught']} of the others, {mutants['share']:.1%}"
    return (
        f"NVRTC {resources['nvrtc']} compiles {compiled}: {spills}; the maximum number of registers per thread is "
        f"{most['registers']}. Of {mutants['tried']} mutants of the kernels, {mutants['equivalent']} are equivalent to "
        f"the original; {caught}."
    )
