"""Facts about the machine of a measurement: GPU, driver, CUDA, packages, commit, date."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from bench.paths import ROOT

PACKAGES = ("cllm-gpu", "numpy", "ml_dtypes", "torch", "triton", "pytest", "nvtx")


def _first_line(command: list[str]) -> str | None:
    """The first line of a command's output; None if the command is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def card_facts(cupy: Any) -> dict[str, Any]:
    """The properties of the current device."""
    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "card": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
        "l2_bytes": properties["l2CacheSize"],
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "driver_cuda": cuda_version(runtime.driverGetVersion()),
        "runtime_cuda": cuda_version(runtime.runtimeGetVersion()),
        "cupy": cupy.__version__,
    }


def cuda_version(number: int) -> str:
    """The version that CUDA encodes as a number.

    >>> cuda_version(12090)
    '12.9'
    """
    return f"{number // 1000}.{number % 1000 // 10}"


def host_facts() -> dict[str, Any]:
    """Python, packages, commit and time of the measurement."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _first_line(["git", "describe", "--always", "--dirty"]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def facts() -> dict[str, Any]:
    """All facts about this machine, which must have a GPU."""
    return card_facts(importlib.import_module("cupy")) | host_facts()


def slug(card: str) -> str:
    """The name of a GPU as part of a file name.

    >>> slug("NVIDIA H200")
    'nvidia-h200'
    """
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def result_path(folder: Path, machine: dict[str, Any]) -> Path:
    """<folder>/<card>-<date>.json"""
    return folder / f"{slug(machine['card'])}-{machine['date'][:10]}.json"
