"""Where the tests of fused operations run: the simulator, and CuPy where a GPU is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cllm_gpu.ops.cuda.cupy_launcher import gpu_launcher
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.simulator import RawModule
from cllm_gpu.utils.compiler import find_compiler

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}


@dataclass(frozen=True)
class Device:
    """A launcher and the way to and from its arrays."""

    launcher: Launcher
    put: Callable[[Any], Any]
    get: Callable[[Any], np.ndarray[Any, Any]]


def cupy_device() -> Device:
    """The GPU through CuPy, as a run takes it; for tests marked `gpu`, which run where there is one."""
    import cupy

    return Device(gpu_launcher(cupy)[0], cupy.asarray, cupy.asnumpy)


def simulator_or_skip() -> Any:
    """The simulator's RawModule; the test is skipped where there is no C++ compiler."""
    if find_compiler() is None:
        pytest.skip("the simulator needs a C++ compiler")
    return RawModule


def simulator_device() -> Device:
    """The simulator; skipped as by `simulator_or_skip`."""
    return Device(Launcher(np, simulator_or_skip()), lambda x: np.array(x, copy=True), np.asarray)
