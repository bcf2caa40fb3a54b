"""Describes the machine on which results are measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from cllm_gpu.utils.versions import environment, package_version


def processor() -> str:
    """The name of the processor, if the system provides it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Versions and processor, for a measurement of this package's training on a CPU."""
    return {**environment(), "processor": processor(), "mkl": package_version("mkl")}


def load() -> float | None:
    """The load average over the last minute; None if the system does not provide it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
