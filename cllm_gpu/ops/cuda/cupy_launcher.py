"""The launcher for the current NVIDIA GPU."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.cublaslt import load_cublaslt
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.profiling import Watch, unwatched


def gpu_launcher(cupy: Any, *, tf32: bool = False, watched: Watch = unwatched) -> tuple[Launcher, str]:
    """A launcher for CuPy arrays, and a line that names the library of its matrix products: cuBLASLt, or why not.

    watched: as `Launcher.watched`.
    """
    generation = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["major"]
    try:
        lt = load_cublaslt(generation, watched)
    except UserError as error:
        line = f"matrix products by cuBLAS gemmEx, without epilogues ({error})"
        return Launcher(cupy, cupy.RawModule, tf32=tf32, watched=watched), line
    return Launcher(cupy, cupy.RawModule, tf32=tf32, lt=lt, watched=watched), f"matrix products by {lt.description}"
