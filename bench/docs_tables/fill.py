"""Fills in the tables of the README and docs/ from the committed result files; `--check` only compares them.

usage: python -m bench.docs_tables.fill [--check]
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

from bench.docs_tables import card_tables, performance_tables
from bench.mutation import record
from bench.paths import RESULTS, ROOT


def load(name: str) -> Any:
    """Read a result file as plain data."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def first_run() -> str:
    """The recorded output of `make train`, without the configuration and most steps."""
    lines = (RESULTS / "first_run.txt").read_text(encoding="utf-8").splitlines()
    steps = [number for number, line in enumerate(lines) if line.startswith("step ")]
    begin = next(number for number, line in enumerate(lines) if line.startswith("model: "))
    shown = [lines[0], "…", *lines[begin : steps[2]], "…", *lines[steps[-3] :]]
    return "\n".join(["```", *(line.rstrip() for line in shown), "```"])


def comparison() -> str:
    """The table written by `cllm-gpu compare`."""
    return (RESULTS / "comparison.md").read_text(encoding="utf-8").strip()


def prepare_memory() -> str:
    """A sentence on preparing a large text."""
    found = load("prepare_memory.json")
    prepare, text = found["prepare"], found["text_bytes"] / 1e9
    return (
        f"A text of {text:.1f} GB was prepared in {prepare['seconds']:.0f} s with a peak of "
        f"{prepare['peak_bytes'] / 1e6:.0f} MB of memory ({found['machine']['processor']}, "
        f"{found['machine']['cores']} cores, {found['machine']['date']})."
    )


def cpu_training() -> str:
    """Both sizes compared with PyTorch, and the time to the first step."""
    found = load("cpu_training.json")
    machine, shapes = found["machine"], found["shapes"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {found['date'][:10]}; medians of {found['rounds']} rounds."
    ]
    for size, rows in found["sizes"].items():
        shape = ", ".join(f"{name}={value}" for name, value in shapes[size].items())
        lines += ["", f"| {shape} | tokens/s | relative to PyTorch | peak memory |", "|---|---:|---:|---:|"]
        lines += [
            f"| {name} | {row['tokens_per_second']:,.0f} | {row['speed_ratio']:.2f}× | {row['peak_megabytes']:.0f} MB |"
            for name, row in rows.items()
        ]
    first = {name: statistics.median(taken) for name, taken in found["command_to_first_step_seconds"].items()}
    spoken = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in first.items())
    return "\n".join([*lines, "", f"Time from the command to the end of the first step: {spoken}."])


def experiment(name: str) -> str:
    """Loss and gain of every variant over the seeds; lattice_cpu.py measures step times."""
    found = load(f"{name}.json")
    lines = [
        "| attention | parameters | validation loss (nats/token) | gain | least gain |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in found["summaries"]:
        gain, least = _with_spread(row["gains"], "+.4f"), f"{min(row['gains']):+.4f}"
        if row is found["summaries"][0]:
            gain = least = "–"
        loss = _with_spread(row["losses"], ".4f")
        lines.append(f"| {row['variant']} | {row['parameters']:,} | {loss} | {gain} | {least} |")
    seeds, made = found["seeds"], found["made"]
    spoken = f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "One seed"
    steps = found["config"]["training"]["steps"]
    return "\n".join([*lines, "", f"{spoken}, {steps:,} steps; {made['system']}, {made['date']}."])


def _with_spread(values: list[float], form: str) -> str:
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def lattice_cpu() -> str:
    """The cost of the terms in a training step on a CPU, with bytes and with a larger vocabulary."""
    found = [load("lattice_cpu.json"), load("lattice_cpu_bpe.json")]
    heads = [f"step, V = {report['vocabulary']:,} | relative to standard" for report in found]
    lines = [f"| terms | {heads[0]} | {heads[1]} |", "|---|---:|---:|---:|---:|"]
    for name in found[0]["step_milliseconds"]:
        cells = [f"{r['step_milliseconds'][name]:.1f} ms | {r['ratio_to_standard'][name]:.2f}×" for r in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    machine = found[0]["machine"]
    made = f"{machine['processor']}, {found[0]['workers']} workers, {found[0]['date'][:10]}"
    return "\n".join([*lines, "", f"Medians of {found[0]['rounds']} alternating rounds, backend native; {made}."])


def recompute() -> str:
    """Time and memory of the recompute levels, and tokens per second by batch size, on a CPU."""
    found = load("recompute.json")
    lines = [
        "| recompute | activations | step time | processor time |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {row['activation_bytes'] / 1e6:.1f} MB | {row['ratio']:.2f}× | {row['processor_ratio']:.2f}× |"
        for name, row in found["levels"].items()
    ]
    rows = found["sequences_per_worker"]
    best = max(row["tokens_per_processor_second"] for row in rows.values())
    lines += ["", f"| sequences per worker | {' | '.join(rows)} |", "|---|" + "---:|" * len(rows)]
    shares = (f"{row['tokens_per_processor_second'] / best:.2f}" for row in rows.values())
    lines += [f"| tokens per second of processor time, relative to the best | {' | '.join(shares)} |"]
    machine = found["machine"]
    made = f"{machine['processor']}, {found['workers']} workers, {found['date'][:10]}"
    return "\n".join(
        [*lines, "", f"Medians of {found['rounds']} alternating steps, backend native; {made}. Not a GPU."]
    )


def precision() -> str:
    """Final losses of each precision, and the distance of its curves from those of fp32."""
    found = load("precision.json")
    lines = [
        "| precision | final validation loss (nats/byte) | largest distance of means | largest distance, same seed |",
        "|---|---:|---:|---:|",
    ]
    for mode, row in found["modes"].items():
        distances = f"{max(row['distance_of_means']):.4f} | {row['largest_pair']:.4f}"
        if mode == "fp32":
            distances = "– | –"
        lines.append(f"| {mode} | {_with_spread(row['last'], '.4f')} | {distances} |")
    machine, seeds = found["machine"], ", ".join(map(str, found["seeds"]))
    spread = f"distances are from fp32, whose seeds differ by {min(found['spread']):.4f} to {max(found['spread']):.4f}"
    made = f"{machine['processor']}, {machine['system']}, {found['date'][:10]}"
    return "\n".join([*lines, "", f"{found['steps'][-1]} steps, seeds {seeds}; {spread}. {made}."])


def lattice_instructions() -> str:
    """The instructions that the terms add to the attention kernels: ratios, then counts by class."""
    found = load("lattice_instructions.json")
    lines = [
        "| D | terms | instructions per pair, no match | no match | bytes | BPE | all match | fused backward, bytes |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    fused = {(row["head_size"], row["terms"]): row for row in found["totals"] if row["backward"] == "fused"}
    for row in (row for row in found["totals"] if row["backward"] == "two kernels"):
        ratios = [row["ratio_to_standard"][case] for case in ("least", "bytes", "BPE", "most")]
        ratios.append(fused[row["head_size"], row["terms"]]["ratio_to_standard"]["bytes"])
        cells = " | ".join(f"{ratio:.2f}×" for ratio in ratios)
        least = row["instructions_per_pair"]["least"]
        lines.append(f"| {row['head_size']} | {row['terms']} | {least:.1f} | {cells} |")
    lines += ["", *_instructions_by_kind(found, 64, "same token, matches to 8"), ""]
    shares = "; ".join(
        f"{text} {', '.join(f'{100 * share:.0f}' for share in next(iter(groups.values())))} %"
        for text, groups in found["share_of_groups_matching"].items()
    )
    text, vocabulary = found["text"], found["vocabularies"]["BPE"]
    return "\n".join(
        [
            *lines,
            f"Fraction of the groups of 128 pairs in which some pair matches in 1, 2, … 8 tokens: {shares} "
            f"({text['sequences']} sequences of {text['length']:,} tokens of the standard library; the BPE vocabulary "
            f"has {vocabulary:,}).",
            "",
            f"bf16 kernels compiled for {found['architecture']} by NVRTC {found['nvrtc']}, disassembled by nvdisasm "
            f"{found['nvdisasm']}, {found['date'][:10]}.",
        ]
    )


def _instructions_by_kind(found: dict[str, Any], head_size: int, terms: str) -> list[str]:
    """Instructions per pair by class, for the forward and the two backward kernels together."""

    def sums(choice: str, case: str) -> dict[str, float]:
        rows = [row for row in found["kernels"] if row["head_size"] == head_size and row["terms"] == choice]
        parts = [row["instructions_per_pair"][case] for row in rows if "fused" not in row["kernel"]]
        return {kind: sum(part[kind] for part in parts) for kind in parts[0]}

    columns = [sums("standard", "least"), sums(terms, "least"), sums(terms, "bytes")]
    return [
        f"| instructions per pair, D = {head_size} | standard | {terms}: no match | bytes |",
        "|---|---:|---:|---:|",
        *(f"| {kind} | {' | '.join(f'{column[kind]:.1f}' for column in columns)} |" for kind in columns[0]),
    ]


EXPERIMENTS = ("crystalline_bytes", "crystalline_bpe", "crystalline_larger", "crystalline_choices")
BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "first_run": first_run,
        "prepare_memory": prepare_memory,
        "comparison": comparison,
        "cpu_training": cpu_training,
    },
    "docs/kernels.md": {"mutation": record.table},
    "docs/performance.md": {
        **{name: functools.partial(performance_tables.losses, name) for name in ("optimizers", "optimizers_mini")},
        "schedules": functools.partial(performance_tables.schedule_effects, "optimizers"),
        "schedules_mini": functools.partial(performance_tables.schedule_effects, "optimizers_mini"),
        "gradient_flow": performance_tables.gradient_flow,
        "stability": performance_tables.stability,
        "kernels": performance_tables.kernels,
        "training_on_a_card": card_tables.training,
        "cpu_training": cpu_training,
        "lattice_cpu": lattice_cpu,
        "recompute": recompute,
        "prepare_memory": prepare_memory,
    },
    "docs/precision.md": {"precision": precision},
    "docs/crystalline.md": {
        **{name: functools.partial(experiment, name) for name in EXPERIMENTS},
        "lattice_cpu": lattice_cpu,
        "lattice_instructions": lattice_instructions,
    },
}
"""Document → name of a generated block → function that renders it."""


def filled(document: str) -> str:
    """The document with every generated block rendered from the results."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for name, render in BLOCKS[document].items():
        before, after = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        head, begin, rest = text.partition(before)
        _, end, tail = rest.partition(after)
        if not (begin and end):
            raise SystemExit(f"{document} lacks the block {name}")
        text = f"{head}{begin}{render()}\n{end}{tail}"
    return text


def main() -> int:
    """Write the documents, or with --check compare them. Returns exit status 1 if one differs."""
    differing = 0
    for document in BLOCKS:
        path, after = ROOT / document, filled(document)
        if "--check" not in sys.argv[1:]:
            path.write_text(after, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != after:
            print(f"{document} differs from bench/results: run python -m bench.docs_tables.fill")
            differing = 1
    return differing


if __name__ == "__main__":
    sys.exit(main())
