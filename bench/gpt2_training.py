"""Trains a 10M model and GPT-2 124M and 350M on one card, beside the same models in PyTorch, in one run.

    python bench/gpt2_training.py               prints tables, writes bench/results/gpt2_training-<card>-<date>.json
    python bench/gpt2_training.py --rehearse    runs every line at toy sizes without a card; times and writes nothing

Ours: `cllm-gpu train --precision bf16`, steps captured and replayed. PyTorch: bench/gpu/nanogpt.py, compiled, flash
attention, fused AdamW, bf16 autocast. Same weights, same batches, same number of tokens; each side at each batch in a
process of its own, with the two largest batches that fit. tokens/s: the median of windows after a warm-up. Memory: what
the card has less of at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.gpu import machine, report  # noqa: E402
from bench.gpu.parts import TIMED_OUT, Finished, last_line, module, run_program  # noqa: E402
from bench.gpu.training_bars import training_bars, trouble  # noqa: E402
from bench.gpu.training_sides import (  # noqa: E402
    OUT_OF_MEMORY,
    REHEARSED,
    SIDES,
    SIZES,
    Side,
    Size,
    empty_row,
    measure_side,
)
from cllm_gpu import gpu  # noqa: E402
from cllm_gpu.throughput import FORMULA, Peak, Throughput, flop_per_token  # noqa: E402

RESULTS, LOGS = ROOT / "bench" / "results", ROOT / "build" / "gpu-check"
LEFT_OUT = "not measured: out of time"
BATCHES = 2
"""Of each side and model: the largest that fit. The best is one of them, and compiling takes most of the time."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train beside PyTorch on this machine's card.")
    parser.add_argument("--rehearse", action="store_true", help="run everything at toy sizes, time nothing")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="which models")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together")
    parser.add_argument("--no-torch", action="store_true", help="measure our side alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args(arguments)


def cases(names: list[str], sides: tuple[Side, ...], sizes: dict[str, Size]) -> Iterator[tuple[Side, str, int]]:
    """Both sides of a batch one after the other; batches from large to small, models in the order asked for."""
    return ((side, name, batch) for name in names for batch in sizes[name].batches for side in sides)


def row_of(finished: Finished, side: Side, name: str, batch: int) -> dict[str, Any]:
    """What a side's process printed, or a note on how it ended."""
    if finished.status == TIMED_OUT:
        return empty_row(side, name, batch, LEFT_OUT)
    if finished.status != 0:
        return empty_row(side, name, batch, f"failed: {last_line(finished)}")
    printed = [line for line in finished.output.splitlines() if line.startswith('{"side"')]
    return json.loads(printed[-1]) if printed else empty_row(side, name, batch, "failed: printed no row")


def measure(side: Side, name: str, batch: int, seconds: float) -> dict[str, Any]:
    """One side at one batch, in a process of its own so that neither finds the other's memory taken."""
    command = module("bench.gpu.training_sides", side, name, str(batch))
    return row_of(run_program(command, seconds, LOGS / f"{side}-{name}-{batch}.log"), side, name, batch)


def run(options: argparse.Namespace, sides: tuple[Side, ...], about: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows. What does not fit, and what is out of time, says so."""
    end, rows = time.monotonic() + 60 * options.minutes, []
    fitting: Counter[tuple[str, str]] = Counter()
    for side, name, batch in cases(options.sizes, sides, REHEARSED if options.rehearse else SIZES):
        if fitting[side, name] == BATCHES:
            continue
        print(f"{name}, B={batch}, {side} …", flush=True)
        left = end - time.monotonic()
        if options.rehearse:
            row = measure_side(side, name, batch, rehearse=True)
        else:
            row = measure(side, name, batch, left) if left > 5 else empty_row(side, name, batch, LEFT_OUT)
        rows.append(row)
        fitting[side, name] += row["note"] != OUT_OF_MEMORY
        add_utilisation(rows)
        write(options, about, rows)
    return rows


def add_utilisation(rows: list[dict[str, Any]]) -> None:
    """MFU of every row, by one formula and over the one peak that our side knows of the card."""
    peaks = [row["peak"] for row in rows if row["peak"]]
    for row in rows:
        speed, row["mfu"] = row["tokens_per_second"], None
        if peaks and speed is not None:
            flop = flop_per_token(SIZES[row["size"]].architecture())
            row["mfu"] = Throughput(flop, Peak(*peaks[0])).utilisation(speed)


def write(options: argparse.Namespace, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The result so far: a run that is cut short keeps what it measured."""
    if options.rehearse:
        return
    shapes = {name: vars(SIZES[name]) | {"flop_per_token": flop_per_token(SIZES[name].architecture())}
              for name in options.sizes}  # fmt: skip
    bars = [bar.as_dict() for bar in training_bars(rows, about["card"])]
    finite = [row | {"losses": [x if math.isfinite(x) else None for x in row["losses"]]} for row in rows]
    content = {"machine": about, "flop_formula": FORMULA, "sizes": shapes, "rows": finite, "bars": bars}
    path = options.output / f"gpt2_training-{machine.result_path(Path(), about).name}"
    report.write_json(path, content)


def training_table(rows: list[dict[str, Any]]) -> str:
    """Every side at every batch: tokens/s, MFU, memory, first and last checked loss."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        [
            row["size"],
            str(row["batch"]),
            row["side"],
            cell(row["tokens_per_second"], ",.0f"),
            cell(row["mfu"], ".1%"),
            cell(row["held_bytes"] and row["held_bytes"] / 1e9, ".2f"),
            " → ".join(f"{loss:.4f}" for loss in (row["losses"][:1] + row["losses"][-1:])),
            row["note"],
        ]
        for row in rows
    ]
    return report.table(["model", "B", "side", "tokens/s", "MFU", "GB", "loss", "note"], lines)


def chosen_sides(options: argparse.Namespace) -> tuple[tuple[Side, ...], str]:
    """(sides, a line on PyTorch)."""
    if options.no_torch:
        return SIDES[:1], "PyTorch is left out"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a third party's import warns of is not ours to mend
            import torch
    except ImportError:
        return SIDES[:1], "PyTorch is not installed: our side is measured alone"
    if not options.rehearse and not torch.cuda.is_available():
        return SIDES[:1], f"PyTorch {torch.__version__} sees no card: our side is measured alone"
    return SIDES, f"PyTorch {torch.__version__}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status 1 when a side fails or the two do not train alike. A bar not reached is no failure."""
    options = parse(arguments)
    os.environ.pop("CLLM_SIMULATOR_CHECK", None)
    obstacle = None if options.rehearse else gpu.missing(gpu.find_driver(), has_cupy=gpu.has_cupy())
    if obstacle is not None:
        print(f"error: no card: {obstacle} (--rehearse runs everything without one)", file=sys.stderr)
        return 1
    sides, line = chosen_sides(options)
    print(line)
    about = {} if options.rehearse else machine.facts() | {"beside": line}
    rows = run(options, sides, about)
    print("\n" + training_table(rows))
    sizes = REHEARSED if options.rehearse else SIZES
    wrong = trouble(rows, {name: size.vocabulary for name, size in sizes.items()})
    for problem in wrong:
        print(f"wrong: {problem}")
    if options.rehearse:
        print("rehearsal: nothing was timed, nothing was written")
    else:
        print("\n" + report.bar_table(training_bars(rows, about["card"])))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
