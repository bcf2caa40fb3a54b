"""Compiles and loads the shared library, and reads its table of entry points."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cllm_gpu.ops.native import blas
from cllm_gpu.utils.compiler import compile_library
from cllm_gpu.utils.errors import UserError

SOURCES = Path(__file__).parent / "csrc"
_ARM = platform.machine().lower() in ("arm64", "aarch64")  # where clang takes the processor by -mcpu only
FLAGS = (
    "-std=c++17",
    "-O3",
    "-mcpu=native" if _ARM else "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
)
"""No flag lets the compiler assume finite numbers: NaN and infinity propagate."""

_TYPES: dict[str, Any] = {
    "v": None,
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "n": ctypes.c_int,
    "u": ctypes.c_uint64,
    "w": ctypes.c_uint32,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}
"""By the letters of csrc/entry.hpp."""

NO_MEMORY, BAD_INDEX = 1, 2


class _Entry(ctypes.Structure):
    """`Entry` of csrc/entry.hpp."""

    _fields_ = (("name", ctypes.c_char_p), ("types", ctypes.c_char_p), ("address", ctypes.c_void_p))


class Kernels:
    """The entry points for one real type, and the matrix product they use."""

    def __init__(self, library: ctypes.CDLL, dtype: str, gemm: int | None) -> None:
        self.gemm = gemm
        """Address of a cblas_?gemm; None for the library's own matrix product."""
        self.functions: dict[str, Callable[..., Any]] = {}
        table = getattr(library, f"entries_{dtype}")
        table.restype = ctypes.POINTER(_Entry)
        for entry in table():
            if entry.name is None:
                break
            prototype = ctypes.CFUNCTYPE(*(_TYPES[letter] for letter in entry.types.decode()))
            self.functions[entry.name.decode()] = prototype(entry.address)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self.functions[name]


class Library:
    """The loaded library, the first argument of every native operation."""

    def __init__(self, path: Path, products: blas.Blas | None) -> None:
        loaded = ctypes.CDLL(str(path))
        self.products = products.description if products else "own matrix products"
        self._kernels = {
            np.dtype(np.float32): Kernels(loaded, "float32", products.sgemm if products else None),
            np.dtype(np.float64): Kernels(loaded, "float64", products.dgemm if products else None),
        }

    def kernels(self, x: Any) -> Kernels:
        """The entry points for the dtype of `x`. Raises ValueError unless it is float32 or float64."""
        try:
            return self._kernels[x.dtype]
        except KeyError:
            raise ValueError(f"native operations take float32 and float64, not {x.dtype}") from None


def load_library(*, use_mkl: bool | None = None) -> Library:
    """Compile (once per machine) and load the library. Raises UserError if there is no compiler or it fails.

    `use_mkl`: use MKL's matrix products if it is installed; None means yes unless $CLLM_MKL is 0.
    """
    if os.name == "nt":  # g++ on Windows does not align the stack for 32-byte vectors (GCC bug 54412)
        raise UserError("the native backend is not available on Windows; use the backend numpy")
    if use_mkl is None:
        use_mkl = os.environ.get("CLLM_MKL") != "0"
    sources = [SOURCES / "operations.cpp"]
    path = compile_library(sources, sorted(SOURCES.glob("*.hpp")), FLAGS, key=processor())
    try:
        return Library(path, blas.load_mkl() if use_mkl else None)
    except OSError as error:
        raise UserError(f"the compiled library {path} does not load: {error}") from error


@functools.cache
def processor() -> str:
    """The processor's model and features, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def check_status(status: int, name: str, bound: int) -> None:
    """Raise MemoryError or IndexError for an entry point's status; array `name` holds indices below `bound`."""
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for the scratch space of {name}")
    if status == BAD_INDEX:
        raise IndexError(f"{name} holds an index outside 0 … {bound - 1}")
