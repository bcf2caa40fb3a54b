"""Compiles kernels with NVIDIA's runtime compiler (NVRTC) without a GPU, and parses their resource usage.

NVRTC is a library of the wheel `nvidia-cuda-nvrtc-cu12` (or -cu13), or of a CUDA toolkit; it needs no driver. Used by
the tests and by bench/compiled/kernel_resources.py.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm_gpu.ops.cuda.kernel_source import load_source
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.library_cache import cache_directory

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_COMMENT = re.compile(r"//[^\n]*")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Resources:
    """The resource usage of a kernel on one architecture, from the compiler's report."""

    kernel: str
    architecture: str
    registers: int
    """Per thread."""
    shared_bytes: int
    """Static shared memory per block."""
    stack_bytes: int
    spill_bytes: int
    """Bytes of spill stores plus spill loads per thread."""


def _candidates() -> list[str]:
    names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
    found = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    paths = [str(path) for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.*[0-9]"))]
    paths += [str(path) for folder in folders for path in sorted(folder.glob("*/bin/**/nvrtc64_*_0.dll"))]
    return [path for path in paths if ".alt." not in path] + names


@functools.cache
def load_nvrtc() -> Any | None:
    """The NVRTC library, or None if there is none."""
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _require() -> Any:
    library = load_nvrtc()
    if library is None:
        raise UserError("NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12")
    return library


def compile_kernels(source: str, name: str, options: Sequence[str], architecture: str) -> list[Resources]:
    """Compile `source` to machine code for `architecture`. Returns the resources of each of its kernels.

    Raises UserError with the compiler's first error, or if NVRTC is not installed.
    """
    return parse_report(_compile(source, name, options, architecture)[0])


def machine_code_of(variant: Variant, architecture: str) -> bytes:
    """One variant of our sources as a cubin (an ELF image for nvdisasm). Raises UserError as `compile_kernels`."""
    return _compile(load_source(variant.source), variant.source, variant.options, architecture)[1]


def _compile(source: str, name: str, options: Sequence[str], architecture: str) -> tuple[str, bytes]:
    """The compiler's log and the machine code."""
    library = _require()
    program = ctypes.c_void_p()
    text, file = source.encode(), name.encode()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), text, file, 0, None, None), "create")
    try:
        flags = [*options, f"-arch={architecture}", "-ftz=true", "--ptxas-options=-v"]
        array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        status = library.nvrtcCompileProgram(program, len(flags), array)
        log = _log(library, program)
        if status:
            lines = [line for line in log.splitlines() if "error" in line] or log.splitlines() or ["no message"]
            raise UserError(f"NVRTC cannot compile {name} for {architecture}: {lines[0]}")
        return log, _machine_code(library, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _machine_code(library: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(library, library.nvrtcGetCUBINSize(program, ctypes.byref(size)), "cubin size")
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, library.nvrtcGetCUBIN(program, buffer), "cubin")
    return buffer.raw


def _log(library: Any, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(library, library.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "log size")
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, library.nvrtcGetProgramLog(program, buffer), "log")
    return buffer.value.decode()


def _check(library: Any, status: int, what: str) -> None:
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise UserError(f"NVRTC failed ({what}): {library.nvrtcGetErrorString(status).decode()}")


def parse_report(log: str) -> list[Resources]:
    """Parse the verbose report of ptxas."""
    parts = list(_ENTRY.finditer(log))
    found = []
    for index, match in enumerate(parts):
        stop = parts[index + 1].start() if index + 1 < len(parts) else len(log)
        text = log[match.end() : stop]
        spills, used, shared = _SPILLS.search(text), _USED.search(text), _SHARED.search(text)
        if spills is None or used is None:
            raise UserError(f"the compiler's report on {match[1]} has no line of resources")
        found.append(
            Resources(
                kernel=match[1],
                architecture=match[2],
                registers=int(used[1]),
                shared_bytes=int(shared[1]) if shared else 0,
                stack_bytes=int(spills[1]),
                spill_bytes=int(spills[2]) + int(spills[3]),
            )
        )
    return found


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) version of NVRTC. Raises UserError if it is not installed."""
    library = _require()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "version")
    return major.value, minor.value


def declared_name(variant: Variant, kernel: str) -> str:
    """What the report of resources calls a kernel: its name, and what its variant has.

    "+terms" with score terms, "+symmetry" with the lattice's symmetry, "+alone" without master weights.
    """
    names = {name for name, _ in variant.defines}
    if any(name.startswith("TERM_") for name in names):
        kernel += "+terms"
    if "SYMMETRY_PAIRS" in names:
        kernel += "+symmetry"
    alone = "CLLM_WITHOUT_MASTERS" in names and kernel.startswith(("adam_step", "sgd_step"))
    return f"{kernel}+alone" if alone else kernel


def resources_of(variant: Variant, architecture: str) -> list[Resources]:
    """`compile_kernels` for one variant of our sources; cached."""
    text = load_source(variant.source)
    code = _COMMENT.sub("", text)  # so that a comment that changes does not compile everything again
    key = "\0".join([code, *variant.options, architecture, *map(str, nvrtc_version())])
    path = cache_directory() / "nvrtc" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if path.exists():
        return [Resources(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    found = compile_kernels(text, variant.source, variant.options, architecture)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps([dataclasses.asdict(entry) for entry in found]), encoding="utf-8")
    os.replace(scratch, path)
    return found
