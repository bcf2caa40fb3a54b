"""What a result depends on besides its configuration: versions and system."""

from __future__ import annotations

import importlib.metadata
import platform

from cllm_gpu import __version__
from cllm_gpu.utils.system import usable_cores


def package_version(package: str) -> str:
    """Version of an installed distribution, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, str]:
    """Versions of this package, NumPy and Python, and the system, for a result file."""
    return {
        "cllm_gpu": __version__,
        "numpy": package_version("numpy"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {usable_cores()} cores",
    }
