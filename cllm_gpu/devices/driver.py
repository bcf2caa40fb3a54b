"""What this machine has of an NVIDIA GPU, asked of the driver itself, so that it is known before CuPy is installed.

`python -m cllm_gpu.devices.driver` prints the name of the extra that fits the driver (cuda12, cuda13), or nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from dataclasses import dataclass

OLDEST_CUDA = 12
NEWEST_CUDA = 13


@dataclass(frozen=True)
class Driver:
    """An NVIDIA driver: the newest CUDA version it runs, and how many devices it sees."""

    cuda: tuple[int, int]
    devices: int

    @property
    def extra(self) -> str | None:
        """This package's extra with the CuPy that fits, or None for a driver that is too old for any."""
        if self.cuda[0] < OLDEST_CUDA:
            return None
        return f"cuda{min(self.cuda[0], NEWEST_CUDA)}"


def load_library(name: str) -> ctypes.CDLL | None:
    """A shared library of this machine, or None."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def driver_library() -> ctypes.CDLL | None:
    """The library of the NVIDIA driver (CUDA driver API), or None."""
    return load_library("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def find_driver() -> Driver | None:
    """The driver of this machine, or None. Loads the driver's library and asks it; starts no context."""
    library = driver_library()
    if library is None:
        return None
    version, devices = ctypes.c_int(0), ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    if library.cuInit(0) == 0:
        library.cuDeviceGetCount(ctypes.byref(devices))
    return Driver((version.value // 1000, version.value % 1000 // 10), devices.value)


def missing(driver: Driver | None, *, has_cupy: bool) -> str | None:
    """What stands between this machine and the cupy backend, with the mend, in one line; None when nothing does."""
    if driver is None:
        return "no NVIDIA driver found; install the driver for your card, then the extra cuda12 or cuda13"
    if driver.devices == 0:
        return "the NVIDIA driver sees no device; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    if driver.extra is None:
        return f"the NVIDIA driver runs CUDA {driver.cuda[0]}.{driver.cuda[1]}; CUDA {OLDEST_CUDA} or newer is needed"
    if not has_cupy:
        return f"CuPy is not installed; run: pip install 'cllm-gpu[{driver.extra}]'"
    return None


def has_cupy() -> bool:
    """Whether CuPy is installed; does not import it."""
    return importlib.util.find_spec("cupy") is not None


def main() -> None:
    """Print the extra to install, or nothing where there is no usable driver and device."""
    driver = find_driver()
    if driver is not None and driver.devices and driver.extra:
        print(driver.extra)


if __name__ == "__main__":
    main()
