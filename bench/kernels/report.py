"""Result files of the kernel benchmarks, and tables of their rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.kernels.attention_and_adamw import COPY, GEMM
from bench.kernels.targets import Bar, size_text


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically, through a temporary file. Raises ValueError for NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A plain-text table with columns padded to their widest cell.

    >>> print(table(["a", "b"], [["1", "22"]]))
    a  b
    -  --
    1  22
    """
    cells = [list(header), *(list(line) for line in lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def ceilings(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Copy bandwidth in TB/s and GEMM rate in TFLOP/s from the rows; None if they were not measured."""
    found = {row["kernel"]: row["tera_per_second"] for row in rows}
    return {"copy_terabytes": found.get(COPY), "gemm_teraflops": found.get(GEMM)}


def _milliseconds(row: dict[str, Any]) -> str:
    return "-" if row["milliseconds"] is None else f"{row['milliseconds']:.4g}"


def _rate(row: dict[str, Any]) -> str:
    return "-" if row["tera_per_second"] is None else f"{row['tera_per_second']:.4g} {row['unit']}"


def _of_ceiling(row: dict[str, Any], limits: dict[str, float | None]) -> str:
    limit = limits["gemm_teraflops" if row["unit"] == "TFLOP/s" else "copy_terabytes"]
    if row["tera_per_second"] is None or not limit:
        return "-"
    return f"{row['tera_per_second'] / limit:.0%}"


def _beside_ours(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Time relative to our kernel, or to our first one if there are several."""
    same = [
        r for r in rows if (r["kernel"], r["size"]) == (row["kernel"], row["size"]) and r["side"].startswith("ours")
    ]
    if not same or same[0] is row or same[0]["milliseconds"] is None or row["milliseconds"] is None:
        return "-"
    return f"{row['milliseconds'] / same[0]['milliseconds']:.2f}"


def kernel_table(rows: list[dict[str, Any]]) -> str:
    """A table of every side of every kernel: time, rate, fraction of the measured ceiling, time relative to ours."""
    limits = ceilings(rows)
    header = ["kernel", "size", "side", "ms", "rate", "of ceiling", "time / ours", "note"]
    lines = [
        [
            row["kernel"],
            size_text(row["size"]),
            row["side"],
            _milliseconds(row),
            _rate(row),
            _of_ceiling(row, limits),
            _beside_ours(row, rows),
            row["note"],
        ]
        for row in rows
    ]
    return table(header, lines)


def bar_table(bars: list[Bar]) -> str:
    """A table of targets: measured and required values, and the verdict."""
    lines = [
        [
            bar.what,
            "-" if bar.measured is None else f"{bar.measured:.3g}",
            f"{bar.required:g}",
            "-" if bar.stretch is None else f"{bar.stretch:g}",
            bar.unit,
            bar.verdict,
        ]
        for bar in bars
    ]
    return table(["bar", "measured", "required", "stretch", "unit", "verdict"], lines)
