"""Compiles a CUDA source and the simulator's runtime into one shared library, kept in the cache by content."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cllm_gpu.compiler import cache_directory, compiler_version, require_compiler
from cllm_gpu.errors import UserError
from cllm_gpu.simulator import source as cuda_source

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
RUNTIME = HERE / "runtime"

_COMMON = (
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_FAST = ("-O2",)
_CHECKED = ("-O1", "-g1", "-DSIM_CHECKED")
_SANITIZERS = ("thread", "alignment", "null", "shift", "signed-integer-overflow", "integer-divide-by-zero")


@dataclass(frozen=True)
class Built:
    """A compiled CUDA source: its library and the kernels in it, in the order of their `sim_kernel_<i>`."""

    library: Path
    kernels: tuple[cuda_source.KernelDeclaration, ...]
    expressions: tuple[str, ...]


@functools.cache
def native_flags() -> tuple[tuple[str, ...], str]:
    """Flags for this processor, and what the cached result must be keyed by."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return (), platform.machine()
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return (), platform.machine()
    return ("-march=native",), flags[1] if flags else ""


def translate_options(options: Sequence[str]) -> tuple[str, ...]:
    """NVRTC options as the C++ compiler's: definitions, include folders, the standard; the rest concerns a GPU only."""
    kept = ["-std=c++17"]
    pending = iter(options)
    for option in pending:
        if option in ("-I", "-D", "-U", "--include-path", "--define-macro"):
            letter = {"--include-path": "-I", "--define-macro": "-D"}.get(option, option)
            kept.append(letter + next(pending, ""))
        elif option.startswith(("-I", "-D", "-U")):
            kept.append(option)
        elif match := re.fullmatch(r"--?(include-path|define-macro)=(.*)", option):
            kept.append(("-I" if match[1] == "include-path" else "-D") + match[2])
        elif match := re.fullmatch(r"--?std=(c\+\+\d\d)", option):
            kept[0] = f"-std={max(match[1], 'c++17')}"
    return tuple(kept)


def build(code: str, options: Sequence[str], name_expressions: Sequence[str], checked: bool) -> Built:
    """Compile `code`. Raises UserError with the compiler's first error line."""
    compiler = require_compiler()
    native, processor = native_flags()
    flags = (*_COMMON, *native, *(_CHECKED if checked else _FAST), *translate_options(options))
    with _scratch() as scratch:
        path = _source_file(code)
        text = _preprocess(compiler, path, flags)
        user = cuda_source.user_part(text, str(path))
        kernels = tuple(cuda_source.find_kernels(text[user:]))
        expressions = tuple(name_expressions) or tuple(k.name for k in kernels if not k.is_template)
        body = text[:user] + cuda_source.rewrite(text[user:]) + cuda_source.kernel_table(expressions)
        key = _digest(compiler_version(compiler), *flags, processor, body, _runtime_text())
        target = cache_directory() / "simulator" / f"{key}.so"
        if not target.exists():
            _compile(compiler, scratch, body, flags, checked, target)
    return Built(target, kernels, expressions)


@functools.cache
def sanitizer_flags(compiler: str) -> tuple[str, ...]:
    """Flags that make the compiler report memory accesses and broken rules to the runtime's own functions."""
    is_clang = "clang" in compiler_version(compiler)
    bounds = "array-bounds" if is_clang else "bounds-strict"
    entry_exit = "tsan-instrument-func-entry-exit=0"
    silent = ("-mllvm", f"-{entry_exit}") if is_clang else ("--param", entry_exit)
    return (f"-fsanitize={','.join((*_SANITIZERS, bounds))}", *silent)


def _scratch() -> tempfile.TemporaryDirectory[str]:
    folder = cache_directory() / "simulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise UserError(f"cannot write compiled code to {folder}: {error.strerror}; set CLLM_CACHE_DIR") from error


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _runtime_text() -> str:
    files = sorted(path for folder in (INCLUDE, RUNTIME) for path in folder.rglob("*.*") if path.is_file())
    return "".join(path.read_text(encoding="utf-8") for path in files)


def _source_file(code: str) -> Path:
    """The source under a name that depends on its text alone, so that line markers do too."""
    path = cache_directory() / "simulator" / "sources" / f"{_digest(code)}.cu"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(code)
        os.replace(temporary, path)
    return path


def _run(command: Sequence[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise UserError(f"the simulator cannot compile {what}: {lines[0] if lines else 'no message'}")
    return done.stdout


def _preprocess(compiler: str, path: Path, flags: Sequence[str]) -> str:
    headers = ["-I", str(INCLUDE), "-include", str(INCLUDE / "simulator.hpp")]
    return _run([compiler, "-E", "-x", "c++", *flags, *headers, str(path)], "the CUDA source")


def _compile(compiler: str, scratch: str, body: str, flags: Sequence[str], checked: bool, target: Path) -> None:
    text = Path(scratch) / "kernel.ii"
    text.write_text(body)
    objects = [str(Path(scratch) / "kernel.o"), str(runtime_object(checked))]
    flags = (*flags, *(sanitizer_flags(compiler) if checked else ()))
    _run([compiler, *flags, "-w", "-c", "-x", "c++-cpp-output", str(text), "-o", objects[0]], "the CUDA source")
    library = Path(scratch) / target.name
    _run([compiler, "-shared", *objects, "-o", str(library)], "the CUDA source")
    os.replace(library, target)


def runtime_object(checked: bool) -> Path:
    """The runtime as one relocatable object, compiled once per compiler, processor and mode."""
    compiler = require_compiler()
    native, processor = native_flags()
    flags = (*_COMMON, *native, "-O2", "-std=c++17", *(("-DSIM_CHECKED",) if checked else ()))
    key = _digest("runtime", compiler_version(compiler), *flags, processor, _runtime_text())
    target = cache_directory() / "simulator" / f"runtime-{key}.o"
    if not target.exists():
        sources = sorted(str(path) for path in RUNTIME.glob("*.cpp") if checked or "check" not in path.name)
        with _scratch() as scratch:
            built = Path(scratch) / target.name
            _run([compiler, *flags, "-r", "-nostdlib", *sources, "-o", str(built)], "its own runtime")
            os.replace(built, target)
    return target
