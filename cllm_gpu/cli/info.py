"""cllm-gpu info"""

from __future__ import annotations

import inspect
import platform
from dataclasses import dataclass

from cllm_gpu import __version__
from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.cli.parsing import Command
from cllm_gpu.cli.progress import say
from cllm_gpu.devices import driver as gpu
from cllm_gpu.ops.registry import OPERATIONS
from cllm_gpu.utils.compiler import compiler_version, find_compiler
from cllm_gpu.utils.files import readable_size
from cllm_gpu.utils.library_cache import cache_directory
from cllm_gpu.utils.system import usable_cores
from cllm_gpu.utils.versions import package_version

PACKAGES = (
    "numpy",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "nvmath-python",
    "mkl",
    "nvtx",
    "safetensors",
    "tokenizers",
    "ml_dtypes",
    "matplotlib",
)


@dataclass(frozen=True)
class InfoOptions:
    """Show what this machine and this installation support."""

    backend: str | None = None
    """Backend to describe (None: the one a run would use)."""


COMMAND = Command(
    "info",
    InfoOptions,
    examples="""
    # what a run would use on this machine
    cllm-gpu info
    # a given backend
    cllm-gpu info --backend numpy
    """,
)


def main(arguments: list[str]) -> int:
    """Print the information. Returns exit status 0."""
    options = COMMAND.parse(arguments)
    say(f"cllm-gpu {__version__}, Python {platform.python_version()}, {platform.platform()}")
    say(f"processor: {usable_cores()} usable cores, {platform.machine()}")
    compiler = find_compiler()
    say(f"C++ compiler: {compiler_version(compiler) if compiler else 'none; install g++ or clang++, or set CXX'}")
    for name in PACKAGES:
        say(f"{name}: {package_version(name)}")
    _describe_gpu()
    backend = get_backend(options.backend)
    say(f"backend: {backend.description}")
    say(f"trains in: {', '.join(backend.precisions)}")
    say(f"GEMM: {backend.products}")
    say(f"worker threads: {backend.workers}")
    if backend.device is not None:
        say(f"training steps: {backend.device.replays}")
    _describe_operations(backend)
    say(f"cache: {cache_directory()}")
    return 0


def _describe_gpu() -> None:
    driver = gpu.find_driver()
    obstacle = gpu.missing(driver, has_cupy=gpu.has_cupy())
    if driver is not None:
        say(f"NVIDIA driver: CUDA {driver.cuda[0]}.{driver.cuda[1]}, {driver.devices} device(s)")
    if obstacle is not None:
        say(f"GPU: not usable: {obstacle}")
        return
    backend = get_backend("cupy")
    runtime = backend.xp.cuda.runtime
    for index in range(runtime.getDeviceCount()):
        found = runtime.getDeviceProperties(index)
        say(
            f"GPU {index}: {found['name'].decode()}, compute capability {found['major']}.{found['minor']}, "
            f"{readable_size(found['totalGlobalMem'])}"
        )


def _describe_operations(backend: Backend) -> None:
    """Print which operations are CUDA kernels or C++, which are array code, and which this backend does not have."""
    by_side: dict[str, list[str]] = {}
    for name in OPERATIONS:
        operation = inspect.unwrap(getattr(backend.ops, name))  # out of a profiler's range
        module = getattr(operation, "func", operation).__module__
        side = module.removeprefix("cllm_gpu.ops.").partition(".")[0] if ".ops." in module else module
        by_side.setdefault(side, []).append(name)
    missing = by_side.pop("registry", None)
    for side, names in by_side.items():
        say(f"operations in {side}: {', '.join(names)}")
    if missing:
        say(f"operations without a CUDA kernel: {', '.join(missing)}")
