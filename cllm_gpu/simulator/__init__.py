"""Runs CUDA kernels on a CPU: `RawKernel` and `RawModule` with CuPy's call signature, on NumPy arrays.

The kernel source is compiled with the system's C++ compiler; the threads of a block are fibers that switch at barriers
and warp operations. See docs/kernels.md.
"""

from __future__ import annotations

from cllm_gpu.simulator.errors import KernelError
from cllm_gpu.simulator.kernel import RawKernel, RawModule
from cllm_gpu.simulator.launch import Schedule
from cllm_gpu.simulator.schedules import check_schedules, schedules
from cllm_gpu.simulator.settings import settings
from cllm_gpu.simulator.traffic import Traffic

__all__ = [
    "KernelError",
    "RawKernel",
    "RawModule",
    "Schedule",
    "Traffic",
    "check_schedules",
    "schedules",
    "settings",
]
