"""Measures the peak memory and speed of preparing a 2 GB text file; writes bench/results/prepare_memory.json.

    python -m bench.training.prepare_memory [--megabytes 2000] [--folder DIR]

The text is that of the standard library, repeated. Preparing and reopening run in separate processes, whose peak
resident memory (VmHWM on Linux, getrusage elsewhere) includes the interpreter and NumPy. The target is 300 MB. The
folder needs three times the size of the text; everything written there is removed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy

from bench.host import processor
from bench.paths import RESULTS
from cllm_gpu.data import open_dataset
from cllm_gpu.data.sources import find_corpus

RESULT = RESULTS / "prepare_memory.json"
BAR_BYTES = 300_000_000


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(text: Path, cache: Path) -> dict[str, Any]:
    """Open `text` in this process. Returns seconds, processor seconds, peak memory, tokens, and progress reports."""
    reports: list[int] = []
    begin, begin_cpu = time.perf_counter(), time.process_time()
    dataset = open_dataset(
        str(text),
        tokenizer="bytes",
        validation_fraction=0.01,
        seed=1,
        cache_folder=cache,
        context=1024,
        progress=lambda done, total: reports.append(done),
    )
    return {
        "seconds": round(time.perf_counter() - begin, 2),
        "processor_seconds": round(time.process_time() - begin_cpu, 2),
        "peak_bytes": peak_memory(),
        "tokens": len(dataset.train) + len(dataset.validation),
        "progress_reports": len(reports),
    }


def write_text(path: Path, size: int) -> None:
    """Write the text of the standard library repeatedly until `size` bytes are reached."""
    written = 0
    with path.open("wb") as file:
        while written < size:
            for piece in find_corpus("stdlib").pieces():
                written += file.write(piece.text.encode())
                if written >= size:
                    break


def measure_apart(text: Path, cache: Path) -> dict[str, Any]:
    """`measure` in a separate process."""
    command = [sys.executable, __file__, "--measure", str(text), "--folder", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def machine() -> dict[str, Any]:
    """The machine, versions and date, for the result file."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
    }


def main() -> None:
    """Measure and write the result. Exit status 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        text = Path(scratch, "text.txt")
        write_text(text, options.megabytes * 1_000_000)
        size = text.stat().st_size
        prepare, again = (measure_apart(text, Path(scratch)) for _ in range(2))
    prepare["megabytes_per_second"] = round(size / prepare["seconds"] / 1e6, 1)
    peak = max(prepare["peak_bytes"], again["peak_bytes"])
    result = {
        "machine": machine(),
        "text_bytes": size,
        "tokenizer": "bytes",
        "prepare": prepare,
        "open_again": again,
        "bar_bytes": BAR_BYTES,
        "bar_met": peak < BAR_BYTES,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["bar_met"] else 1)


if __name__ == "__main__":
    main()
