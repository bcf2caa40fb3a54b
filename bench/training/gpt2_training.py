"""Trains a 10M model and GPT-2 124M and 350M on one card, beside the same models in PyTorch, in one run.

    python -m bench.training.gpt2_training             prints tables; bench/results/gpt2_training-<card>-<date>.json
    python -m bench.training.gpt2_training --rehearse  every line at toy sizes without a card; times and writes nothing

Ours: `cllm-gpu train --precision bf16`, steps captured and replayed. PyTorch: bench/training/nanogpt.py, compiled,
flash attention, fused AdamW, bf16 autocast. Same weights, same batches, same number of tokens; each side at each batch
in a process of its own, with the two largest batches that fit: first the largest of every model, then the kernels of a
step of 124M by class (bench/training/step_profile.py), then the next batch of each. tokens/s: the median of windows
after a warm-up. Memory: what the card has less of at the end."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu_check import machine
from bench.gpu_check.subprocesses import TIMED_OUT, Finished, last_line, module, run_program
from bench.kernels import report
from bench.paths import RESULTS, ROOT
from bench.training.gpt2_process import OUT_OF_MEMORY, REHEARSED, SIDES, SIZES, Side, Size, empty_row, measure_side
from bench.training.gpt2_targets import TABLES, best, training_bars, trouble
from bench.training.step_profile import empty_profile, profile, profile_text
from cllm_gpu.devices import driver
from cllm_gpu.devices.peak_flops import Peak
from cllm_gpu.model.flops import FORMULA, flop_per_token
from cllm_gpu.training.mfu import Throughput

LOGS = ROOT / "build" / "gpu-check"
LEFT_OUT = "not measured: out of time"
BATCHES = 2
"""Of each side and model: the largest that fit. The best is one of them, and compiling takes most of the time."""
ORDER = ("124M", "10M", "350M")
"""The most asked for first: what is out of time is the end of it."""
PROFILED = "124M"
LEAST_SECONDS = 5.0
"""With less time left nothing is begun."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train beside PyTorch on this machine's card.")
    parser.add_argument("--rehearse", action="store_true", help="run everything at toy sizes, time nothing")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(ORDER), help="which models")
    parser.add_argument("--batches", type=int, default=BATCHES, help="of each side and model, the largest that fit")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together")
    parser.add_argument("--no-torch", action="store_true", help="measure our side alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args(arguments)


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
    command = module("bench.training.gpt2_process", side, name, str(batch))
    return row_of(run_program(command, seconds, LOGS / f"{side}-{name}-{batch}.log"), side, name, batch)


def measure_profile(name: str, batch: int, seconds: float) -> dict[str, Any]:
    """The kernels of a model's steps by class, in a process of their own."""
    command = module("bench.training.step_profile", name, str(batch))
    finished = run_program(command, seconds, LOGS / f"profile-{name}-{batch}.log")
    if finished.status == TIMED_OUT:
        return empty_profile(name, batch, LEFT_OUT)
    printed = [line for line in finished.output.splitlines() if line.startswith('{"size"')]
    if finished.status or not printed:
        return empty_profile(name, batch, f"failed: {last_line(finished)}")
    return json.loads(printed[-1])


class Measurements:
    """What is measured in one run, in the order in which it is worth most; every result is written as it comes."""

    def __init__(self, options: argparse.Namespace, sides: tuple[Side, ...], about: dict[str, Any]) -> None:
        self._options, self._sides, self._about = options, sides, about
        self._end = time.monotonic() + 60 * options.minutes
        self._sizes: dict[str, Size] = REHEARSED if options.rehearse else SIZES
        self._untried = {(side, name): list(self._sizes[name].batches) for name in options.sizes for side in sides}
        self.rows: list[dict[str, Any]] = []
        self.profile: dict[str, Any] | None = None
        """Of PROFILED at our best batch of the first round; None if it was not asked for or had no row."""

    def run(self) -> None:
        """Everything. What does not fit, and what is out of time, says so."""
        for turn in range(self._options.batches):
            for name in self._options.sizes:
                for side in self._sides:
                    self._largest_untried(side, name)
            if turn == 0:
                self._profile()

    def _largest_untried(self, side: Side, name: str) -> None:
        """The largest batch that has not been tried; while one does not fit, the next."""
        batches = self._untried[side, name]
        while batches:
            batch = batches.pop(0)
            print(f"{name}, B={batch}, {side} …", flush=True)
            if self._options.rehearse:
                row = measure_side(side, name, batch, rehearse=True)
            else:
                row = self._in_time(partial(measure, side, name, batch), empty_row(side, name, batch, LEFT_OUT))
            self.rows.append(row)
            add_utilisation(self.rows)
            write(self._options, self._about, self.rows, self.profile)
            if row["note"] != OUT_OF_MEMORY:
                return

    def _profile(self) -> None:
        rows = [row for row in self.rows if (row["side"], row["size"]) == ("ours", PROFILED)]
        chosen = best(rows, "ours", PROFILED) or (rows[-1] if rows and self._options.rehearse else None)
        if chosen is None:
            return
        batch = chosen["batch"]
        print(f"{PROFILED}, B={batch}, kernels by class …", flush=True)
        if self._options.rehearse:
            self.profile = profile(PROFILED, batch, rehearse=True)
            return
        left_out = empty_profile(PROFILED, batch, LEFT_OUT)
        found = self._in_time(partial(measure_profile, PROFILED, batch), left_out)
        self.profile = found | {"step_milliseconds": step_milliseconds(chosen)}
        write(self._options, self._about, self.rows, self.profile)

    def _in_time(self, measured: Callable[[float], dict[str, Any]], left_out: dict[str, Any]) -> dict[str, Any]:
        left = self._end - time.monotonic()
        return measured(left) if left > LEAST_SECONDS else left_out


def step_milliseconds(row: Mapping[str, Any]) -> float:
    """Of a step of a row that was timed."""
    return 1e3 * row["batch"] * SIZES[row["size"]].context / row["tokens_per_second"]


def add_utilisation(rows: list[dict[str, Any]]) -> None:
    """MFU of every row, by one formula and over the one peak that our side knows of the card."""
    peaks = [row["peak"] for row in rows if row["peak"]]
    for row in rows:
        speed, row["mfu"] = row["tokens_per_second"], None
        if peaks and speed is not None:
            flop = flop_per_token(SIZES[row["size"]].architecture())
            row["mfu"] = Throughput(flop, Peak(*peaks[0])).utilisation(speed)


def write(
    options: argparse.Namespace, about: dict[str, Any], rows: list[dict[str, Any]], found: dict[str, Any] | None
) -> None:
    """The result so far, with the profile that was found: a run that is cut short keeps what it measured."""
    if options.rehearse:
        return
    shapes = {name: vars(SIZES[name]) | {"flop_per_token": flop_per_token(SIZES[name].architecture())}
              for name in options.sizes}  # fmt: skip
    bars = [bar.as_dict() for bar in training_bars(rows, about["card"])]
    finite = [row | {"losses": [x if math.isfinite(x) else None for x in row["losses"]]} for row in rows]
    content = {"machine": about, "flop_formula": FORMULA, "sizes": shapes, "rows": finite, "bars": bars,
               "profile": found}  # fmt: skip
    report.write_json(result_path(options, about), content)


def result_path(options: argparse.Namespace, about: dict[str, Any]) -> Path:
    """<output>/gpt2_training-<card>-<date>.json"""
    return options.output / f"gpt2_training-{machine.result_path(Path(), about).name}"


def training_table(rows: list[dict[str, Any]]) -> str:
    """Every side at every batch: tokens/s, MFU, memory, power, first and last checked loss."""

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
            cell(row["watts"], ".0f"),
            cell(row["joules_per_token"], ".3g"),
            " → ".join(f"{loss:.4f}" for loss in (row["losses"][:1] + row["losses"][-1:])),
            row["note"],
        ]
        for row in rows
    ]
    return report.table(["model", "B", "side", "tokens/s", "MFU", "GB", "W", "J/token", "loss", "note"], lines)


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
    obstacle = None if options.rehearse else driver.missing(driver.find_driver(), has_cupy=driver.has_cupy())
    if obstacle is not None:
        print(f"error: no card: {obstacle} (--rehearse runs everything without one)", file=sys.stderr)
        return 1
    sides, line = chosen_sides(options)
    print(line)
    about = {} if options.rehearse else machine.facts() | {"beside": line}
    measurements = Measurements(options, sides, about)
    measurements.run()
    rows, found = measurements.rows, measurements.profile
    print(f"{TABLES}\n\n{training_table(rows)}")
    if found is not None:
        print("\n" + profile_text(found))
    sizes = REHEARSED if options.rehearse else SIZES
    wrong = trouble(rows, {name: size.vocabulary for name, size in sizes.items()})
    if found is not None and found["note"].startswith("failed"):
        wrong.append(f"kernels of {PROFILED} by class: {found['note']}")
    for problem in wrong:
        print(f"wrong: {problem}")
    if options.rehearse:
        print("rehearsal: nothing was timed, nothing was written")
        return 1 if wrong else 0
    print("\n" + report.bar_table(training_bars(rows, about["card"])))
    timed = sum(row["tokens_per_second"] is not None for row in rows)
    print(f"\n{timed} of {len(rows)} rows timed, wrote {result_path(options, about)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
