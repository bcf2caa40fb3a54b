"""Compiles every kernel with NVRTC (no GPU needed) and writes what each needs: registers, shared memory, spills.

    python -m bench.compiled.kernel_resources            prints the table and writes bench/results/kernel_resources.json
    python -m bench.compiled.kernel_resources --headers  also writes the most of each kernel into its source's header

Needs the wheel nvidia-cuda-nvrtc-cu12.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.compiled.nvrtc import ARCHITECTURES, declared_name, nvrtc_version, resources_of
from bench.paths import RESULTS
from cllm_gpu.ops.cuda.kernel_source import source_directory
from cllm_gpu.ops.cuda.variants import all_variants
from cllm_gpu.utils.errors import UserError

RESULT = RESULTS / "kernel_resources.json"
TITLE = (
    "// Resources, the most over all variants and sm_80, sm_90, sm_100 (written by bench/compiled/kernel_resources.py):"
)
COLUMNS = f"//   {'kernel':<42}{'registers':>10}{'shared':>8}{'spilled':>9}"


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


def most(rows: list[dict[str, Any]]) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Source → kernel → the most registers, shared bytes and spilled bytes."""
    table: dict[str, dict[str, tuple[int, int, int]]] = {}
    for row in rows:
        kernels = table.setdefault(row["source"], {})
        new = (row["registers"], row["shared_bytes"], row["spill_bytes"])
        old = kernels.get(row["declared"], (0, 0, 0))
        kernels[row["declared"]] = tuple(map(max, old, new))  # type: ignore[assignment]
    return table


def header_lines(kernels: dict[str, tuple[int, int, int]]) -> list[str]:
    """The table as it stands in a source's header."""
    lines = [f"//   {name:<42}{r:>10}{s:>8}{p:>9}" for name, (r, s, p) in sorted(kernels.items())]
    return [TITLE, COLUMNS, *lines]


def write_headers(table: dict[str, dict[str, tuple[int, int, int]]]) -> None:
    """Replace the resources in each source's header."""
    for source, kernels in table.items():
        path = source_directory() / source
        text = path.read_text(encoding="utf-8")
        old = re.search(r"^// Resources.*\n(?://.*\n)*", text, re.MULTILINE)
        if old is None:
            raise UserError(f"{source} has no line '// Resources' in its header")
        path.write_text(text.replace(old[0], "\n".join(header_lines(kernels)) + "\n"), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="resources of every CUDA kernel, by NVRTC")
    parser.add_argument("--headers", action="store_true", help="write the table into the sources' headers too")
    arguments = parser.parse_args()
    try:
        version = ".".join(map(str, nvrtc_version()))
        rows = measure()
        table = most(rows)
        if arguments.headers:
            write_headers(table)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    RESULT.write_text(f'{{"nvrtc": "{version}", "kernels": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"NVRTC {version}, {', '.join(ARCHITECTURES)}: registers per thread, bytes of static shared memory, spilled")
    for kernels in table.values():
        for name, (registers, shared, spilled) in sorted(kernels.items()):
            print(f"{name:<44}{registers:>6}{shared:>8}{spilled:>6}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
