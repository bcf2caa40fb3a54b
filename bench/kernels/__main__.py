"""Benchmarks every kernel against PyTorch's, on one GPU, in one run.

    python -m bench.kernels                 prints the tables and writes bench/results/kernels-<card>-<date>.json
    python -m bench.kernels --rehearse      runs everything on the simulator at toy sizes; times and writes nothing

Without PyTorch, only our kernels are measured. Times are medians of CUDA event times with a cold L2 cache. FLOP are
counted by FlashAttention's convention; bandwidths and rates are compared with a copy and a matrix product of the same
run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from bench.gpu_check import machine
from bench.kernels import attention_and_adamw, lattice, linear, lm_head, norm_loss_gelu, report
from bench.kernels.jobs import failures, measure
from bench.kernels.targets import all_bars
from bench.kernels.timing import Card, Device, Rehearsal
from bench.kernels.torch_side import TorchSide, load_torch
from bench.paths import RESULTS
from cllm_gpu.devices import driver
from cllm_gpu.utils.errors import UserError

MODULES = (attention_and_adamw, lattice, norm_loss_gelu, linear, lm_head)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Benchmark the kernels against PyTorch's on this machine's GPU.")
    parser.add_argument("--rehearse", action="store_true", help="run everything on the simulator, time nothing")
    parser.add_argument("--only", default="", help="only problems whose name contains this text")
    parser.add_argument("--minutes", type=_positive, default=15.0, help="start no new problem after this time")
    parser.add_argument("--seconds", type=_positive, default=0.4, help="duration of one measurement")
    parser.add_argument("--no-compile", action="store_true", help="do not measure torch.compile")
    parser.add_argument("--no-torch", action="store_true", help="measure only our kernels")
    parser.add_argument("--output", type=Path, help="result file (default: bench/results/kernels-<card>-<date>.json)")
    return parser.parse_args(arguments)


def _positive(text: str) -> float:
    value = float(text)
    if not (0.0 < value < float("inf")):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def open_device(options: argparse.Namespace) -> Device:
    """The GPU, or the simulator for a rehearsal. Raises UserError if it is not available."""
    if options.rehearse:
        return Rehearsal()
    obstacle = driver.missing(driver.find_driver(), has_cupy=driver.has_cupy())
    if obstacle is not None:
        raise UserError(f"no card: {obstacle} (--rehearse runs everything without one)")
    return Card(importlib.import_module("cupy"), seconds=options.seconds)


def run(options: argparse.Namespace, device: Device, torch: TorchSide | None, about: dict[str, Any]) -> int:
    """Measure every problem and print the tables. Returns exit status 1 if a kernel of ours fails or results differ."""
    begun, rows = time.monotonic(), []
    module_problems = [
        found
        for module in MODULES
        for found in (module.rehearsal_problems() if device.rehearsal else module.full_problems())
    ]
    for problem in module_problems:
        if options.only not in problem.name and problem.name not in (
            attention_and_adamw.COPY,
            attention_and_adamw.GEMM,
        ):
            continue
        if time.monotonic() - begun > 60 * options.minutes:
            rows.append(_left_out(problem.name))
            continue
        print(f"{problem.name} …", flush=True)
        rows += measure(problem, device, torch)
        _write(options, about, rows)
    print("\n" + report.kernel_table(rows))
    wrong = failures(rows) + device.refused()
    for line in wrong:
        print(f"wrong: {line}")
    if device.rehearsal:
        print("rehearsal on the simulator: nothing was timed, nothing was written")
    else:
        print("\n" + report.bar_table(all_bars(rows, report.ceilings(rows), about["card"])))
    return 1 if wrong else 0


def _left_out(name: str) -> dict[str, Any]:
    note = "not measured: out of time"
    row = dict.fromkeys(("milliseconds", "tera_per_second"))
    return {"kernel": name, "side": "", "size": {}, "unit": "", "note": note} | row


def _write(options: argparse.Namespace, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the results so far, so that an interrupted run keeps its measurements."""
    if options.rehearse:
        return
    path = options.output or RESULTS / f"kernels-{machine.result_path(Path(), about).name}"
    limits = report.ceilings(rows)
    bars = [bar.as_dict() for bar in all_bars(rows, limits, about["card"])]
    report.write_json(path, {"machine": about, "ceilings": limits, "rows": rows, "bars": bars})


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status."""
    options = parse(arguments)
    os.environ.pop("CLLM_SIMULATOR_CHECK", None)
    try:
        device = open_device(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    warnings.simplefilter("ignore")  # warnings of torch and its compiler
    torch, line = None, "PyTorch is left out"
    if not options.no_torch:
        compiled = not options.no_compile and not options.rehearse
        torch, line = load_torch(device.xp, compile_functions=compiled)
    print(line)
    print(device.products)
    about = {} if options.rehearse else machine.facts() | {"beside": line, "products": device.products}
    return run(options, device, torch, about)


if __name__ == "__main__":
    sys.exit(main())
