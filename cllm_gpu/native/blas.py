"""Intel MKL's matrix products, where the extra `mkl` is installed: single-threaded, called from each worker.

Only the sequential layer is loaded, so MKL brings no threads or OpenMP runtime of its own into the process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

SEQUENTIAL_LAYER = 1
"""MKL_THREADING_SEQUENTIAL of mkl_service.h."""


@dataclass(frozen=True)
class Blas:
    """Addresses of two functions with 32-bit integers, and what to call them in a log."""

    sgemm: int
    dgemm: int
    description: str


@functools.cache
def load_mkl() -> Blas | None:
    """MKL from the Python package `mkl`; None where that is not installed or does not load."""
    path = _find_library()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.MKL_Set_Threading_Layer(ctypes.c_int(SEQUENTIAL_LAYER))
        addresses = [ctypes.cast(getattr(library, f"cblas_{kind}gemm"), ctypes.c_void_p).value for kind in "sd"]
    except (OSError, AttributeError):
        return None
    sgemm, dgemm = addresses
    if sgemm is None or dgemm is None:
        return None
    return Blas(sgemm, dgemm, f"matrix products by MKL {importlib.metadata.version('mkl')}")


def _find_library() -> Path | None:
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    prefix = "mkl_rt" if os.name == "nt" else "libmkl_rt"
    for file in files:
        if file.name.startswith(prefix) and (file.suffix == ".dll" or ".so" in file.name or ".dylib" in file.name):
            return Path(str(file.locate())).resolve()
    return None
