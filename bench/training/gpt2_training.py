"""Trains a 10M model and GPT-2 124M and 350M on one GPU, compared with the same models in PyTorch, in one run.

    python -m bench.training.gpt2_training             prints tables; bench/results/gpt2_training-<card>-<date>.json
    python -m bench.training.gpt2_training --rehearse  runs everything at toy sizes without a GPU; times, writes nothing

Ours: `cllm-gpu train --precision bf16`, steps captured and replayed. PyTorch: bench/training/nanogpt.py, compiled,
flash attention, fused AdamW, bf16 autocast. Same weights, batches and number of tokens; each side runs each batch size
in a separate process, with the two largest batch sizes that fit: first the largest of every model, then the kernels of
a step of 124M by class (bench/training/step_profile.py), then the next batch size of each. tokens/s: the median of
windows after a warmup. Memory: the decrease of the GPU's free memory."""

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
from bench.training.gpt2_targets import TABLES, best, failures, training_bars
from bench.training.step_profile import empty_profile, profile, profile_text
from cllm_gpu.devices import driver
from cllm_gpu.devices.peak_flops import Peak
from cllm_gpu.model.flops import FORMULA, flop_per_token
from cllm_gpu.training.mfu import Throughput

LOGS = ROOT / "build" / "gpu-check"
LEFT_OUT = "not measured: out of time"
BATCHES = 2
"""Batch sizes per side and model, the largest that fit: one of them is the best, and compilation takes most time."""
ORDER = ("124M", "10M", "350M")
"""Order of importance: the last ones are omitted if time runs out."""
PROFILED = "124M"
LEAST_SECONDS = 5.0
"""Nothing is started with less time left."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare training with PyTorch on this machine's GPU.")
    parser.add_argument("--rehearse", action="store_true", help="run everything at toy sizes, time nothing")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(ORDER), help="which models")
    parser.add_argument("--batches", type=int, default=BATCHES, help="of each side and model, the largest that fit")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together")
    parser.add_argument("--no-torch", action="store_true", help="measure our side alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args(arguments)


def row_of(finished: Finished, side: Side, name: str, batch: int) -> dict[str, Any]:
    """The row printed by a side's process, or a row with a note on how it ended."""
    if finished.status == TIMED_OUT:
        return empty_row(side, name, batch, LEFT_OUT)
    if finished.status != 0:
        return empty_row(side, name, batch, f"failed: {last_line(finished)}")
    printed = [line for line in finished.output.splitlines() if line.startswith('{"side"')]
    return json.loads(printed[-1]) if printed else empty_row(side, name, batch, "failed: printed no row")


def measure(side: Side, name: str, batch: int, seconds: float) -> dict[str, Any]:
    """Measure one side at one batch size, in a separate process so that memory is not shared with the other side."""
    command = module("bench.training.gpt2_process", side, name, str(batch))
    return row_of(run_program(command, seconds, LOGS / f"{side}-{name}-{batch}.log"), side, name, batch)


def measure_profile(name: str, batch: int, seconds: float) -> dict[str, Any]:
    """Profile the kernels of a model's steps by class, in a separate process."""
    command = module("bench.training.step_profile", name, str(batch))
    finished = run_program(command, seconds, LOGS / f"profile-{name}-{batch}.log")
    if finished.status == TIMED_OUT:
        return empty_profile(name, batch, LEFT_OUT)
    printed = [line for line in finished.output.splitlines() if line.startswith('{"size"')]
    if finished.status or not printed:
        return empty_profile(name, batch, f"failed: {last_line(finished)}")
    return json.loads(printed[-1])


class Measurements:
    """The measurements of one run, in order of importance; every result is written as soon as it is available."""

    def __init__(self, options: argparse.Namespace, sides: tuple[Side, ...], about: dict[str, Any]) -> None:
        self._options, self._sides, self._about = options, sides, about
        self._end = time.monotonic() + 60 * options.minutes
        self._sizes: dict[str, Size] = REHEARSED if options.rehearse else SIZES
        self._untried = {(side, name): list(self._sizes[name].batches) for name in options.sizes for side in sides}
        self.rows: list[dict[str, Any]] = []
        self.profile: dict[str, Any] | None = None
        """The profile of PROFILED at our best batch size of the first round; None if that was not measured."""

    def run(self) -> None:
        """Measure everything; rows that do not fit into memory or time get a note."""
        for turn in range(self._options.batches):
            for name in self._options.sizes:
                for side in self._sides:
                    self._largest_untried(side, name)
            if turn == 0:
                self._profile()

    def _largest_untried(self, side: Side, name: str) -> None:
        """Measure the largest untried batch size that fits."""
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
    """Step time of a timed row in milliseconds."""
    return 1e3 * row["batch"] * SIZES[row["size"]].context / row["tokens_per_second"]


def add_utilisation(rows: list[dict[str, Any]]) -> None:
    """Add the MFU to every row, by the same formula and with the peak of the GPU known from our side."""
    peaks = [row["peak"] for row in rows if row["peak"]]
    for row in rows:
        speed, row["mfu"] = row["tokens_per_second"], None
        if peaks and speed is not None:
            flop = flop_per_token(SIZES[row["size"]].architecture())
            row["mfu"] = Throughput(flop, Peak(*peaks[0])).utilisation(speed)


def write(
    options: argparse.Namespace, about: dict[str, Any], rows: list[dict[str, Any]], found: dict[str, Any] | None
) -> None:
    """Write the results so far and the profile, so that an interrupted run keeps its measurements."""
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
    """A table of every side at every batch size: tokens/s, MFU, memory, power, first and last checked loss."""

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
    """(sides to measure, a message on PyTorch)."""
    if options.no_torch:
        return SIDES[:1], "PyTorch is left out"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of a third-party import
            import torch
    except ImportError:
        return SIDES[:1], "PyTorch is not installed: our side is measured alone"
    if not options.rehearse and not torch.cuda.is_available():
        return SIDES[:1], f"PyTorch {torch.__version__} sees no card: our side is measured alone"
    return SIDES, f"PyTorch {torch.__version__}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns 1 if a side fails or the losses differ; a missed target is not a failure."""
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
    wrong = failures(rows, {name: size.vocabulary for name, size in sizes.items()})
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
