"""Benchmark jobs, and how they are measured into rows of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bench.kernels.counts import tera_per_second
from bench.kernels.timing import Device, Timing
from bench.kernels.torch_side import TorchSide

COMPARED = 1 << 24
"""Number of elements of a result that are compared."""
LARGEST_DIFFERENCE = 2e-2
"""Bound on ‖theirs − ours‖ / ‖ours‖ for bf16 results of the same function: 2^-8 for each of a few roundings."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Job:
    """One implementation of a kernel at one size. A kernel's first job is ours; the others are compared with it."""

    kernel: str
    side: str
    """"ours", or the name of the alternative."""
    size: dict[str, Any]
    call: Callable[[], Any]
    amount: float
    """FLOP or bytes per call, the same for every side."""
    unit: str
    """TFLOP/s or TB/s."""
    result: Callable[[], Any] | None = None
    """Returns the result of the call as a device array; None: nothing to compare."""
    prepare: Callable[[], None] = field(default=_nothing)
    """Called before every call, untimed."""


class Problem(Protocol):
    """One size of one family of kernels."""

    name: str
    needs_bytes: int
    """Memory that all sides together need."""

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        """The jobs, ours first. Arrays live as long as the iterator."""
        ...


def measure(problem: Problem, device: Device, torch: TorchSide | None) -> list[dict[str, Any]]:
    """The rows of a problem: every side measured, or with a note saying why not."""
    if problem.needs_bytes > device.free_bytes():
        note = f"not measured: needs {problem.needs_bytes / 1e9:.1f} GB of free memory"
        return [_row_without_job(problem.name, note)]
    rows = []
    ours: dict[str, Any] = {}
    try:
        for job in problem.jobs(device, torch):
            rows.append(_measure_job(job, device, ours))  # noqa: PERF401 (rows before a failure are kept)
    except Exception as error:  # creating a side's operands failed: out of memory, or an error in torch
        rows.append(_row_without_job(problem.name, f"stopped: {_one_line(error)}"))
    device.release()
    if torch is not None:
        torch.release()
    return rows


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def _row_without_job(name: str, note: str) -> dict[str, Any]:
    return {
        "kernel": name, "side": "", "size": {}, "milliseconds": None, "tera_per_second": None, "unit": "", "note": note
    }  # fmt: skip


def _measure_job(job: Job, device: Device, ours: dict[str, Any]) -> dict[str, Any]:
    device.release()  # make memory freed by earlier sides available to torch, and vice versa
    try:
        job.prepare()
        job.call()
        difference = _difference(job, device, ours)
        return row_of(job, device.time(job.call, job.prepare), difference)
    except Exception as error:  # such as a kernel missing in a library; continue with the other sides
        return row_of(job, None, None) | {"note": f"failed: {_one_line(error)}"}


def _difference(job: Job, device: Device, ours: dict[str, Any]) -> float | None:
    """Relative difference of a result from ours; None for ours, which is stored."""
    if job.result is None:
        return None
    found = device.xp.ravel(job.result())[:COMPARED].astype(np.float32)
    if job.kernel not in ours:
        ours[job.kernel] = found.copy()
        return None
    mine = ours[job.kernel]
    return float(((found - mine) ** 2).sum() / (mine**2).sum()) ** 0.5


def row_of(job: Job, timing: Timing | None, difference: float | None) -> dict[str, Any]:
    """A row of the result: kernel, side, size, time, rate and difference from ours, as plain data."""
    return {
        "kernel": job.kernel,
        "side": job.side,
        "size": job.size,
        "milliseconds": timing.median if timing else None,
        "quartiles": [timing.lower, timing.upper] if timing else None,
        "repeats": timing.repeats if timing else 0,
        "tera_per_second": tera_per_second(job.amount, timing.median) if timing else None,
        "unit": job.unit,
        "difference": difference,
        "note": note_on(difference),
    }


def note_on(difference: float | None) -> str:
    """A note if a result differs too much from ours, or is NaN; else empty."""
    if difference is None or difference <= LARGEST_DIFFERENCE:
        return ""
    return f"differs from ours by {difference:.2g}"


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Errors: our kernel failed, or a result differs from ours."""
    return [
        f"{row['kernel']}, {row['side']}: {row['note']}"
        for row in rows
        if (row["side"].startswith("ours") and row["note"]) or row["note"].startswith(("differs", "stopped"))
    ]
