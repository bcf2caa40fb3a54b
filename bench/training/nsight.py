"""Profiles training steps with Nsight Systems: make profile

    python -m bench.training.nsight [--steps 12] [--output build/profile/training] [-- flags of `cllm-gpu train` …]

Writes <output>.nsys-rep, to be opened in Nsight Systems, and prints the time of each range and of each kernel.
docs/profiling.md explains how to read them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.paths import ROOT
from cllm_gpu.devices import driver
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.profiling import DOMAIN

INSTALL = (
    "Nsight Systems is not installed: install nsight-systems from NVIDIA's package repository or with the installer at "
    "https://developer.nvidia.com/nsight-systems, and add nsys to the PATH"
)
REPORTS = ("nvtx_pushpop_sum", "cuda_gpu_kern_sum", "cuda_gpu_mem_time_sum")


def _candidates() -> Iterator[Path]:
    found = shutil.which("nsys")
    if found:
        yield Path(found)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nsys"
    yield Path("/usr/local/cuda/bin/nsys")
    yield from sorted(Path("/opt/nvidia/nsight-systems").glob("*/bin/nsys"), reverse=True)


def find_nsys() -> Path:
    """Path of the program nsys. Raises UserError saying what to install if there is none."""
    for program in _candidates():
        if os.access(program, os.X_OK):
            return program
    raise UserError(INSTALL)


def profile_command(nsys: Path, output: Path, run: Path, steps: int, flags: list[str]) -> list[str]:
    """The command line that profiles a training run of `steps` steps."""
    train = [sys.executable, "-m", "cllm_gpu", "train", "--output", str(run), "--training.steps", str(steps)]
    quiet = ["--training.evaluate-every", "0", "--training.checkpoint-every", "0", "--training.sample-tokens", "0"]
    quiet.append("--training.no-capture")  # kernels of a graph have no ranges
    trace = ["--trace", "cuda,nvtx,cublas,osrt", "--sample", "none", "--cpuctxsw", "none"]
    return [str(nsys), "profile", *trace, "--force-overwrite", "true", "--output", str(output), *train, *quiet, *flags]


def stats_command(nsys: Path, report: Path) -> list[str]:
    """The command line that prints the tables of a report."""
    tables = [option for name in REPORTS for option in ("--report", name)]
    return [str(nsys), "stats", "--force-export", "true", *tables, str(report)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; arguments after `--` are for `cllm-gpu train`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description="Profile training steps with Nsight Systems.")
    parser.add_argument("--steps", type=int, default=12, help="training steps; the first compiles the kernels")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "profile" / "training")
    options = parser.parse_args(given[:cut])
    options.flags = given[cut + 1 :]
    if options.steps < 2:
        parser.error(f"--steps is {options.steps}; at least 2 are needed, since the first compiles the kernels")
    return options


def profile(options: argparse.Namespace) -> int:
    """Profile and print the tables. Returns the first nonzero exit status. Raises UserError if a tool is missing."""
    nsys = find_nsys()
    obstacle = driver.missing(driver.find_driver(), has_cupy=driver.has_cupy())
    if obstacle is not None:
        raise UserError(f"no card to profile: {obstacle}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = profile_command(nsys, options.output, Path(folder) / "run", options.steps, options.flags)
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        return status
    report = options.output.with_suffix(".nsys-rep")
    print(f"wrote {report}; ranges are in the domain {DOMAIN}: docs/profiling.md")
    return subprocess.run(stats_command(nsys, report), cwd=ROOT, check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit status."""
    try:
        return profile(parse(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
