"""Times the kernels of a model's training steps and prints them by class; runs in a separate process.

    python -m bench.training.step_profile 124M 64

The steps are those of bench/training/gpt2_process.py, launched kernel by kernel instead of as a graph. The ceilings of
the GPU are not data-sheet figures: a copy and a matrix product are measured in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from typing import Any

from bench.kernels.attention_and_adamw import CopyCeiling, GemmCeiling
from bench.kernels.jobs import measure
from bench.kernels.report import ceilings
from bench.kernels.timing import Card, Device, Rehearsal
from bench.training.gpt2_process import OUT_OF_MEMORY, REHEARSED, SIZES, Size, our_backend, our_trainer, says_no_memory
from bench.training.kernel_times import WARMUP_STEPS, Clock, CudaClock, KernelTimes
from bench.training.roofline import GELU, gaps_sentence, largest_gaps, profile_rows, profile_table, step_work
from cllm_gpu.training.reporter import Silent

STEPS = WARMUP_STEPS + 5
COPIED, MULTIPLIED = 2 << 30, 8192
"""Bytes of the copy and size of the square matrix product that serve as ceilings."""


def kernel_times(size: Size, batch: int, clock: Clock, *, rehearse: bool) -> KernelTimes:
    """Train STEPS steps one by one with every launch timed."""
    backend = our_backend(rehearse=rehearse)
    times = KernelTimes(clock)
    # a checkpoint due after every step keeps other steps from being in flight; without a folder none is written
    trainer = our_trainer(size, batch, backend, Silent(), steps=STEPS, capture=False, checkpoint_every=1)
    try:
        trainer.initialise()
        backend.ranges.watch = times
        trainer.train()
    finally:
        backend.ranges.watch = None
        trainer.close()
    return times


def measure_ceilings(*, rehearse: bool) -> dict[str, float | None]:
    """The TB/s of a copy and the TFLOP/s of a matrix product on this GPU; None in a rehearsal."""
    device: Device = Rehearsal() if rehearse else Card(importlib.import_module("cupy"))
    size, side = (1 << 12, 32) if rehearse else (COPIED, MULTIPLIED)
    problems = CopyCeiling(size), GemmCeiling(side)
    return ceilings([row for problem in problems for row in measure(problem, device, None)])


def profile(name: str, batch: int, *, rehearse: bool) -> dict[str, Any]:
    """The rows by class, the two largest gaps, and the ceilings; only a note if memory does not suffice."""
    size = (REHEARSED if rehearse else SIZES)[name]
    try:
        clock = Clock() if rehearse else CudaClock(importlib.import_module("cupy"))
        times = kernel_times(size, batch, clock, rehearse=rehearse)
    except Exception as error:
        if not says_no_memory(error):
            raise
        return empty_profile(name, batch, OUT_OF_MEMORY)
    seen, limits = times.by_class(), measure_ceilings(rehearse=rehearse)
    work = step_work(size.architecture(), batch, fused=GELU not in seen)
    rows = profile_rows(work, seen, limits["copy_terabytes"], limits["gemm_teraflops"])
    found = {"rows": rows, "gaps": largest_gaps(rows), "ceilings": limits, "whole_milliseconds": times.whole_step()}
    return empty_profile(name, batch) | found


def empty_profile(name: str, batch: int, note: str = "") -> dict[str, Any]:
    """A profile without measurements. step_milliseconds: the step time measured for the tokens/s."""
    return {"size": name, "batch": batch, "note": note, "rows": [], "gaps": [], "ceilings": {},
            "whole_milliseconds": None, "step_milliseconds": None}  # fmt: skip


def profile_text(found: dict[str, Any]) -> str:
    """The profile as text: the table, gaps, step times and ceilings."""
    head = f"{found['size']}, B={found['batch']}, by class of kernel"
    if found["note"]:
        return f"{head}: {found['note']}"
    lines = [f"{head}:", profile_table(found["rows"]), gaps_sentence(found["gaps"])]
    limits, whole, timed = found["ceilings"], found["whole_milliseconds"], found["step_milliseconds"]
    if whole is not None:
        kernels = sum(row["milliseconds"] or 0.0 for row in found["rows"])
        lines.append(f"a step launched kernel by kernel, with events: {whole:.2f} ms, of it {kernels:.2f} in kernels")
    if timed is not None:
        lines.append(f"a step as timed in the comparison with PyTorch, without events: {timed:.2f} ms")
    if limits["copy_terabytes"] and limits["gemm_teraflops"]:
        lines.append(f"a copy: {limits['copy_terabytes']:.2f} TB/s; a product: {limits['gemm_teraflops']:.0f} TFLOP/s")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Profile one model. Messages go to standard error, the result to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("batch", type=int)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):
        found = profile(options.size, options.batch, rehearse=options.rehearse)
    print(json.dumps(found, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
