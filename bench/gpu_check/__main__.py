"""Checks everything that needs a GPU, in under ten minutes: make gpu-check

    python -m bench.gpu_check [--minutes 10] [--only PART …] [--output FOLDER]

With an NVIDIA GPU and CuPy: every test on CuPy, 1000 repeats for equal bits, training against NumPy, compute-sanitizer
over every kernel, the kernel benchmarks, and in the remaining time training compared with PyTorch; `--only training`
runs all of the latter alone. Writes bench/results/<card>-<date>.json and gpt2_training-<card>-<date>.json, and prints
tables with the targets. Needs numpy, ml_dtypes, cupy, pytest and this checkout, but no network. Logs of every part are
in build/gpu-check.

Without a GPU: runs the parts that need none on the simulator, and prints one line on the others. That is a success,
unless CLLM_REQUIRE_GPU=1. A missed target is reported and is not a failure; a part that fails is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench.paths import RESULTS, ROOT

NEEDED = ("numpy", "ml_dtypes", "pytest")


def missing_packages() -> str | None:
    """A one-line message naming the missing packages; None if none are missing."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{', '.join(absent)} not installed here; unpack the wheels into a folder and name it in PYTHONPATH"


if __name__ == "__main__" and (absent := missing_packages()) is not None:  # before the modules that import them
    sys.exit(f"error: {absent}")

from bench.gpu_check import machine  # noqa: E402
from bench.gpu_check.sanitizer import INSTALL, TOOLS, find_sanitizer, read_verdict  # noqa: E402
from bench.gpu_check.subprocesses import (  # noqa: E402
    FAILED,
    NOT_RUN,
    PASSED,
    Outcome,
    Part,
    module,
    outcome_of,
    read_junit,
    run_program,
    tests_outcome,
)
from bench.kernels import report  # noqa: E402
from bench.kernels.targets import all_bars  # noqa: E402
from bench.training.gpt2_targets import TABLES  # noqa: E402
from cllm_gpu.devices import driver  # noqa: E402
from cllm_gpu.utils.compiler import find_compiler  # noqa: E402

LOGS = ROOT / "build" / "gpu-check"
REPEATS, TRAINED = "tests/gpu/test_repeats.py", ("tests/gpu/test_training.py", "tests/ops/cuda/test_training.py")
TRAINING = "training"
"""The part that trains whole models, with a separate result file."""
WHOLE_TRAINING = 400.0
"""Seconds from which on it runs more than one batch size of every model."""


def pytest_part(name: str, seconds: float, *selection: str) -> Part:
    """Tests that need a GPU; in parallel if pytest-xdist is installed, since compilation takes most of the time."""

    def run(limit: float) -> Outcome:
        xml = LOGS / f"{name.replace(' ', '-')}.xml"
        xml.unlink(missing_ok=True)
        parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
        # warnings of libraries on an unknown machine must not fail the tests
        options = ["--device", "cupy", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={xml}", *parallel]
        log = xml.with_suffix(".log")
        done = run_program(module("pytest", *options, *selection), limit, log)
        return tests_outcome(name, done, read_junit(xml))

    return Part(name, seconds, True, run)


def sanitizer_part(tool: str, seconds: float) -> Part:
    """One tool of compute-sanitizer over every kernel."""
    name = f"compute-sanitizer {tool}"

    def run(limit: float) -> Outcome:
        sanitizer = find_sanitizer()
        if sanitizer is None:
            return Outcome(name, NOT_RUN, INSTALL)
        command = sanitizer.command(tool, module("bench.gpu_check.launch_all", "--device", "cupy", "--quick"))
        done = run_program(command, limit, LOGS / f"{tool}.log")
        if done.status == 124:
            return outcome_of(name, done)
        verdict = read_verdict(tool, done.status, done.output)
        return Outcome(name, PASSED if verdict.passed else FAILED, verdict.detail, done.seconds)

    return Part(name, seconds, True, run)


def benchmark_part(seconds: float) -> Part:
    """bench/kernels; if it runs out of time, its measurements so far are kept."""

    def run(limit: float) -> Outcome:
        path = LOGS / "kernels.json"
        path.unlink(missing_ok=True)
        minutes = str(max(0.1, 0.8 * limit / 60))
        command = [sys.executable, "-m", "bench.kernels", "--output", str(path), "--minutes", minutes]
        done = run_program(command, limit, LOGS / "kernels.log")
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        measured = [row for row in data.get("rows", []) if row["milliseconds"] is not None]
        detail = f"{len(measured)} rows measured"
        plain = outcome_of("benchmarks", done)
        detail = detail if plain.status == PASSED else f"{plain.detail}; {detail}"
        return Outcome("benchmarks", plain.status, detail, done.seconds, data)

    return Part("benchmarks", seconds, True, run)


def training_part(seconds: float, output: Path) -> Part:
    """bench/training/gpt2_training.py, which ends in time by itself and reports what it did not measure."""

    def run(limit: float) -> Outcome:
        minutes = str(max(0.1, (limit - 10) / 60))
        batches = [] if limit >= WHOLE_TRAINING else ["--batches", "1"]
        command = [
            sys.executable,
            "bench/training/gpt2_training.py",
            "--minutes",
            minutes,
            "--output",
            str(output),
            *batches,
        ]
        done = run_program(command, limit, LOGS / "training.log")
        plain = outcome_of(TRAINING, done)
        tables = done.output.partition(TABLES)[2].strip()
        return Outcome(TRAINING, plain.status, plain.detail, done.seconds, {"tables": tables})

    return Part(TRAINING, seconds, True, run)


def compile_part(seconds: float) -> Part:
    """Compiles every kernel for this GPU into CuPy's cache, which the other parts use."""

    def run(limit: float) -> Outcome:
        return outcome_of("compile", run_program(module("bench.gpu_check.precompile"), limit, LOGS / "compile.log"))

    return Part("compile", seconds, True, run)


def host_part(name: str, seconds: float, *command: str) -> Part:
    """A part that runs on the simulator: needs a C++ compiler and no GPU."""

    def run(limit: float) -> Outcome:
        if find_compiler() is None:
            return Outcome(name, NOT_RUN, "no C++ compiler for the simulator; install g++ or clang++")
        return outcome_of(name, run_program([sys.executable, *command], limit, LOGS / f"{name.replace(' ', '-')}.log"))

    return Part(name, seconds, False, run)


def all_parts(output: Path = RESULTS) -> list[Part]:
    """All parts in order; with a GPU their seconds add up to less than ten minutes. output: folder of results."""
    others = [f"--ignore={path}" for path in (REPEATS, *TRAINED)]
    return [
        host_part(
            "kernels on the simulator", 280, "-m", "bench.gpu_check.launch_all", "--device", "simulator", "--quick"
        ),
        host_part("benchmarks rehearsed", 180, "-m", "bench.kernels", "--rehearse"),
        host_part("training beside PyTorch rehearsed", 90, "-m", "bench.training.gpt2_training", "--rehearse"),
        compile_part(45),
        pytest_part("tests", 110, *others, "tests/ops/cuda", "tests/gpu"),
        pytest_part("1000 repeats", 60, REPEATS),
        pytest_part("training against NumPy", 40, *TRAINED),
        *(sanitizer_part(tool, 35) for tool in TOOLS),
        benchmark_part(90),
        training_part(100, output),
    ]


def run_parts(parts: list[Part], *, card: bool, seconds: float, obstacle: str | None) -> list[Outcome]:
    """Run the parts that this machine supports within `seconds` in total; the others are reported as not run.

    Unused time of a part passes to the next one, and time that no part claims to the first that needs it.
    """
    begun, outcomes, allotted = time.monotonic(), [], 0.0
    for number, part in enumerate(parts):
        elapsed = time.monotonic() - begun
        left = seconds - elapsed
        if part.needs_card and not card:
            outcome = Outcome(part.name, NOT_RUN, f"needs a card: {obstacle}")
        elif left < 5:
            outcome = Outcome(part.name, FAILED, "not begun: out of time")
        else:
            allotted += part.seconds
            print(f"{part.name} …", flush=True)
            unclaimed = left - sum(later.seconds for later in parts[number + 1 :])
            outcome = part.run(min(max(part.seconds, allotted - elapsed, unclaimed), left))
        outcomes.append(outcome)
    return outcomes


def outcome_table(outcomes: list[Outcome]) -> str:
    """A table of part, status, seconds and detail."""
    lines = [[o.name, o.status, f"{o.seconds:.0f}" if o.seconds else "-", o.detail] for o in outcomes]
    return report.table(["part", "status", "s", "detail"], lines)


def result_of(about: dict[str, Any], outcomes: list[Outcome]) -> dict[str, Any]:
    """The content of the result file: the machine, the outcome of each part, the measured rows, and the targets."""
    measured: dict[str, Any] = next((o.data for o in outcomes if o.name == "benchmarks"), {})
    rows: list[dict[str, Any]] = measured.get("rows", [])
    about = about | {name: measured.get("machine", {}).get(name) for name in ("beside", "products")}
    limits = report.ceilings(rows)
    parts = [Outcome(o.name, o.status, o.detail, o.seconds).as_dict() for o in outcomes]
    bars = [bar.as_dict() for bar in all_bars(rows, limits, about["card"])]
    return {"machine": about, "parts": parts, "ceilings": limits, "rows": rows, "bars": bars}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    names = [part.name for part in all_parts()]
    parser = argparse.ArgumentParser(description="Check everything that needs a GPU, in under ten minutes.")
    parser.add_argument("--minutes", type=float, default=10.0, help="total time limit")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of: {', '.join(names)}")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args(arguments)


def report_card(outcomes: list[Outcome], folder: Path) -> None:
    """Write the result file (except for training, which has its own), and print the tables with the targets."""
    training = next((o.data.get("tables") for o in outcomes if o.name == TRAINING), None)
    if training:
        print("\n" + training)
    if all(outcome.name == TRAINING for outcome in outcomes):
        return
    about = machine.facts()
    path = machine.result_path(folder, about)
    result = result_of(about, outcomes)
    report.write_json(path, result)
    bars = all_bars(result["rows"], result["ceilings"], about["card"])
    print("\n" + report.kernel_table(result["rows"]) + "\n\n" + report.bar_table(bars))
    print(f"\n{about['card']}: wrote {path}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns exit status 0 if no part failed."""
    options = parse(arguments)
    obstacle = driver.missing(driver.find_driver(), has_cupy=driver.has_cupy())
    card = obstacle is None
    parts = all_parts(options.output)
    chosen = [part for part in parts if part.name in options.only] if options.only else parts
    if card and not options.only:
        chosen = [part for part in chosen if part.needs_card]  # `make test` covers the simulator's parts
    outcomes = run_parts(chosen, card=card, seconds=60 * options.minutes, obstacle=obstacle)
    if card:
        report_card(outcomes, options.output)
    print("\n" + outcome_table(outcomes))
    failed = any(outcome.status == FAILED for outcome in outcomes)
    if not card:
        print(f"no card: the card's part was not run ({obstacle})")
        return 1 if failed or os.environ.get("CLLM_REQUIRE_GPU") == "1" else 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
