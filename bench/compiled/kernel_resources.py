"""Compiles every kernel with NVRTC (no GPU needed) and writes what each needs: registers, shared memory, spills.

    python -m bench.compiled.kernel_resources        prints the table and writes bench/results/kernel_resources.json

The file holds a row per kernel, variant and architecture, and per kernel the most of all of them: the tests compile
every variant and hold it to that.
Needs the wheel nvidia-cuda-nvrtc-cu12.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.compiled.nvrtc import ARCHITECTURES, declared_name, nvrtc_version, resources_of
from bench.paths import RESULTS
from cllm_gpu.ops.cuda.variants import all_variants
from cllm_gpu.utils.errors import UserError

RESULT = RESULTS / "kernel_resources.json"
COUNTS = ("registers", "shared_bytes", "spill_bytes")


def measure() -> list[dict[str, Any]]:
    """A row per kernel, variant and architecture; two compilations at a time."""
    jobs = [(variant, architecture) for variant in all_variants() for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: resources_of(*job), jobs))
    rows = []
    for (variant, _), found in zip(jobs, results, strict=True):
        choices = {"source": variant.source, "gradient": variant.gradient, "defines": dict(variant.defines)}
        rows += [
            {"declared": declared_name(variant, entry.kernel)} | choices | dataclasses.asdict(entry) for entry in found
        ]
    return rows


def most(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Source → kernel → the most registers, shared bytes and spilled bytes."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for row in sorted(rows, key=lambda row: (row["source"], row["declared"])):
        kernels = table.setdefault(row["source"], {})
        old = kernels.get(row["declared"], dict.fromkeys(COUNTS, 0))
        kernels[row["declared"]] = {name: max(old[name], row[name]) for name in COUNTS}
    return table


def as_text(version: str, rows: list[dict[str, Any]]) -> str:
    """The report as JSON, a line for each kernel and for each row."""
    table = ",\n".join(
        f'"{source}": {{\n' + ",\n".join(f' "{name}": {json.dumps(found)}' for name, found in kernels.items()) + "\n}"
        for source, kernels in most(rows).items()
    )
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"nvrtc": "{version}", "most": {{\n{table}\n}}, "kernels": [\n{lines}\n]}}\n'


def main() -> int:
    """Compile, write, print; exit status."""
    try:
        version = ".".join(map(str, nvrtc_version()))
        rows = measure()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(as_text(version, rows), encoding="utf-8")
    print(f"NVRTC {version}, {', '.join(ARCHITECTURES)}: registers per thread, bytes of static shared memory, spilled")
    for kernels in most(rows).values():
        for name, found in kernels.items():
            print(f"{name:<44}{found['registers']:>6}{found['shared_bytes']:>8}{found['spill_bytes']:>6}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
