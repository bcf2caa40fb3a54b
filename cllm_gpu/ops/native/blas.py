"""Matrix products of Intel MKL, if the extra `mkl` is installed: single-threaded, called from each worker.

MKL runs with its sequential threading layer, so it adds no threads or OpenMP runtime to the process.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import site
import sys
from dataclasses import dataclass
from pathlib import Path

SEQUENTIAL_LAYER = 1
"""MKL_THREADING_SEQUENTIAL of mkl_service.h."""


@dataclass(frozen=True)
class Blas:
    """Addresses of cblas_sgemm and cblas_dgemm with 32-bit integers, and a description for logs."""

    sgemm: int
    dgemm: int
    description: str


@functools.cache
def load_mkl() -> Blas | None:
    """MKL from the Python package `mkl`; None if that is not installed or does not load."""
    path = _find_library()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.MKL_Set_Threading_Layer(ctypes.c_int(SEQUENTIAL_LAYER))
        sgemm, dgemm = (ctypes.cast(getattr(library, f"cblas_{kind}gemm"), ctypes.c_void_p).value for kind in "sd")
        text = ctypes.create_string_buffer(200)
        library.MKL_Get_Version_String(text, ctypes.c_int(len(text)))
    except (OSError, AttributeError):
        return None
    if sgemm is None or dgemm is None:
        return None
    version = re.search(r"[0-9][0-9.]+", text.value.decode("ascii", "replace"))
    return Blas(sgemm, dgemm, f"matrix products by MKL {version[0] if version else ''}".strip())


def _find_library() -> Path | None:
    """Path of the library as pip installs it, in the environment's or the user's lib (Windows: Library\\bin)."""
    folder, pattern = ("Library/bin", "mkl_rt*.dll") if os.name == "nt" else ("lib", "libmkl_rt.*")
    for base in (sys.prefix, site.getuserbase() if site.ENABLE_USER_SITE else None):
        if base and (found := sorted(Path(base, folder).glob(pattern))):
            return found[-1]
    return None
