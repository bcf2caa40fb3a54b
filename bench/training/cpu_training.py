"""Compares training on a CPU with the same model in PyTorch: tokens/s, peak memory, and the time to the first step.

Every side trains in a separate process; rounds alternate between them (A B C D, A B C D, …), so that other load affects
all of them equally, and a ratio is the median of the rounds' ratios. Writes bench/results/cpu_training.json and prints
a table. Needs the extras `witness` (PyTorch) and, for its row, `mkl`.

    python -m bench.training.cpu_training [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.host import load, processor
from bench.paths import RESULTS
from bench.training.cpu_process import SIZES

CONTESTANTS = {
    "PyTorch": ("torch", {}),
    "numpy": ("numpy", {}),
    "native": ("native", {"CLLM_MKL": "0"}),
    "native + mkl": ("native", {"CLLM_MKL": "1"}),
}
STEPS = {"C384": 6, "C128": 60}
LOSS_TOLERANCE = 1e-3  # float32 over a few Adam steps; another model or learning rate differs by more immediately
QUIET_LOAD = 0.5
BARS = {"speed": 1.2, "memory": 1.0, "startup_seconds": 1.0}


def installed(package: str) -> str | None:
    """Version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The machine and versions, for the result file."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_before": load(),
        "versions": {name: installed(name) for name in ("numpy", "torch", "mkl")},
    }


def run_side(name: str, size: str, threads: int) -> dict[str, Any]:
    """Run one process of one side."""
    side, environment = CONTESTANTS[name]
    command = [sys.executable, "-m", "bench.training.cpu_process", side, size, str(STEPS[size]), str(threads)]
    started = time.time()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed on {size}: {done.stderr.strip().splitlines()[-1]}")
    result = json.loads(done.stdout)
    result["process_to_first_step_seconds"] = result.pop("first_step_at") - started
    return result


def measure(size: str, names: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Run all rounds of one size and summarise them."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            runs[name].append(run_side(name, size, threads))
        print(f"{size}: round {number + 1} of {rounds}", file=sys.stderr)
    losses = {name: results[0]["loss"] for name, results in runs.items()}
    for name, loss in losses.items():
        if not (abs(loss - losses["PyTorch"]) <= LOSS_TOLERANCE * abs(losses["PyTorch"])):
            sys.exit(f"{name} ends at loss {loss}, PyTorch at {losses['PyTorch']}: not the same training")
    return {name: summary(results, runs["PyTorch"], size) for name, results in runs.items()}


def summary(results: list[dict[str, Any]], witness: list[dict[str, Any]], size: str) -> dict[str, Any]:
    """Medians of one side, and its ratios to PyTorch in the same round."""
    shape = SIZES[size]
    seconds = statistics.median(result["step_seconds"] for result in results)
    pairs = list(zip(results, witness, strict=True))
    speed = [theirs["step_seconds"] / ours["step_seconds"] for ours, theirs in pairs]
    peak = statistics.median(result["peak_bytes"] for result in results)
    return {
        "description": results[0]["description"],
        "tokens_per_second": round(shape.batch * shape.length / seconds),
        "step_milliseconds": round(1e3 * seconds, 2),
        "speed_ratio": round(statistics.median(speed), 3),
        "speed_ratio_each_round": [round(ratio, 3) for ratio in speed],
        "peak_megabytes": round(peak / 1e6, 1),
        "memory_ratio": round(peak / statistics.median(result["peak_bytes"] for result in witness), 3),
        "process_to_first_step_seconds": round(
            statistics.median(result["process_to_first_step_seconds"] for result in results), 3
        ),
        "loss": results[0]["loss"],
    }


def command_startup(names: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds from starting `cllm-gpu train` to the first line of its metrics (after the first step), by side.

    The first round, which may compile the library and prepare the data, is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names if name != "PyTorch"}
    for number in range(rounds + 1):
        for name, taken in seconds.items():
            elapsed = _time_to_first_step(*CONTESTANTS[name])
            if number:
                taken.append(round(elapsed, 3))
    return seconds


def _time_to_first_step(backend: str, environment: dict[str, str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "run" / "metrics.jsonl"
        command = [sys.executable, "-m", "cllm_gpu", "train", "--backend", backend, "--output", str(metrics.parent),
                   "--training.steps", "2", "--training.sample-tokens", "0"]  # fmt: skip
        # keep compiled Python modules between starts, as for any user
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        start = time.perf_counter()
        with subprocess.Popen(
            command, env={**kept, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None and not metrics.exists():
                    assert process.stderr is not None
                    sys.exit(f"cllm-gpu train failed: {process.stderr.read().strip()}")
                time.sleep(0.002)
            elapsed = time.perf_counter() - start
            process.communicate()
    return elapsed


def print_table(report: dict[str, Any]) -> None:
    """Print the results, a line per side."""
    for size, rows in report["sizes"].items():
        shape = ", ".join(f"{key} {value}" for key, value in vars(SIZES[size]).items())
        print(f"\n{size} ({shape}), float32, {report['threads']} threads")
        print(f"  {'':14}{'tokens/s':>10}{'step':>11}{'speed':>9}{'peak':>11}{'memory':>9}")
        for name, row in rows.items():
            print(
                f"  {name:14}{row['tokens_per_second']:>10}{row['step_milliseconds']:>8.1f} ms"
                f"{row['speed_ratio']:>8.2f}x{row['peak_megabytes']:>8.0f} MB{row['memory_ratio']:>8.2f}x"
            )
    print("\ncllm-gpu train, command to first step done (median, seconds)")
    for name, taken in report["command_to_first_step_seconds"].items():
        print(f"  {name:14}{statistics.median(taken):>8.2f}")
    print(f"\nbars: {BARS}; " + ("all met by " + ", ".join(report["meets_all_bars"] or ["none"])))


def meets_bars(report: dict[str, Any], name: str) -> bool:
    """Whether a side meets every target at every size."""
    startup = report["command_to_first_step_seconds"].get(name)
    return bool(startup) and all(
        rows[name]["speed_ratio"] >= BARS["speed"]
        and rows[name]["memory_ratio"] <= BARS["memory"]
        and statistics.median(startup) < BARS["startup_seconds"]
        for rows in report["sizes"].values()
    )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side at each size")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="which models")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_training.json")
    options = parser.parse_args()
    if installed("torch") is None:
        sys.exit("PyTorch is not installed: pip install 'cllm-gpu[witness]'")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > QUIET_LOAD:
        print(f"load is {os.getloadavg()[0]:.1f}: PyTorch's threads wait for each other, so a busy machine slows it",
              "most; repeat this when the machine is quiet", file=sys.stderr)  # fmt: skip
    names = [name for name in CONTESTANTS if name != "native + mkl" or installed("mkl")]
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "threads": options.threads,
        "rounds": options.rounds,
        "bars": BARS,
        "shapes": {size: vars(SIZES[size]) for size in options.sizes},
        "sizes": {size: measure(size, names, options.rounds, options.threads) for size in options.sizes},
        "command_to_first_step_seconds": command_startup(names, options.rounds),
    }
    report["meets_all_bars"] = [name for name in names if meets_bars(report, name)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print_table(report)


if __name__ == "__main__":
    main()
