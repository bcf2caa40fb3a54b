"""Compiles a CUDA source and the simulator's runtime to one shared library, cached by content."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cllm_gpu.simulator import manifest
from cllm_gpu.simulator import source as cuda_source
from cllm_gpu.simulator.manifest import CompiledSource
from cllm_gpu.utils.compiler import compiler_version, require_compiler
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import remove
from cllm_gpu.utils.library_cache import code_folder, is_sound, write_digest

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
    "-U_FORTIFY_SOURCE",  # its longjmp rejects our stacks
    # Large local arrays are touched page by page, so that a stack overflow hits the guard page.
    *(("-fstack-clash-protection",) if sys.platform == "linux" else ()),
)
_FAST = ("-O2", "-g1")
_CHECKED = ("-O1", "-g1", "-DSIM_CHECKED")
_SANITIZERS = ("thread", "alignment", "null", "shift", "signed-integer-overflow", "integer-divide-by-zero")


@functools.cache
def native_flags() -> tuple[tuple[str, ...], str]:
    """Compiler flags for this processor, and the processor's part of the cache key."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return (), platform.machine()
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return (), platform.machine()
    return ("-march=native",), flags[1] if flags else ""


def translate_options(options: Sequence[str]) -> tuple[str, ...]:
    """NVRTC options as C++ compiler flags: macros, include folders, the standard. Others apply to GPUs only."""
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


def build(code: str, options: Sequence[str], name_expressions: Sequence[str], checked: bool) -> CompiledSource:
    """Compile `code`, or return the cached result. Raises UserError with the compiler's first error line."""
    compiler = require_compiler()
    native, processor = native_flags()
    flags = (*_COMMON, *native, *(_CHECKED if checked else _FAST), *translate_options(options))
    version = (compiler_version(compiler), processor, _runtime_text(), *sanitizer_flags(compiler))
    folder = _cache()
    record = folder / f"{_digest(code, *flags, '', *name_expressions, *version)}.json"
    if (known := manifest.read(record)) is not None:
        return known
    with _scratch() as scratch:
        path = _source_file(code)
        text = _preprocess(compiler, path, flags)
        user = cuda_source.user_part(text, str(path))
        kernels = tuple(cuda_source.find_kernels(text[user:]))
        expressions = tuple(name_expressions) or tuple(k.name for k in kernels if not k.is_template)
        variables = tuple(cuda_source.find_variables(text[user:]))
        body = text[:user] + cuda_source.rewrite(text[user:]) + cuda_source.kernel_table(expressions, variables)
        target = folder / f"{_digest(*flags, body, *version)}.so"
        if not is_sound(target, [target]):
            extra = instrumentation(compiler, checked, body[user:])
            _compile(compiler, scratch, body, (*flags, *extra), checked, target)
    built = CompiledSource(target, kernels, expressions, variables)
    manifest.write(record, built, cuda_source.included_files(text[user:]))
    return built


def instrumentation(compiler: str, checked: bool, text: str) -> tuple[str, ...]:
    """Compiler flags for calls to the runtime: at every access where they are checked, else at volatile reads only."""
    if checked:
        return sanitizer_flags(compiler)
    has_volatile = re.search(r"(?<!asm )(?<!asm__ )\bvolatile\b", text)
    return ("-fsanitize=thread", *_entry_exit(compiler), *_tell_volatile(compiler)) if has_volatile else ()


def _entry_exit(compiler: str) -> tuple[str, ...]:
    """Flags that leave out the calls at a function's entry and exit."""
    option = "tsan-instrument-func-entry-exit=0"
    return ("-mllvm", f"-{option}") if "clang" in compiler_version(compiler) else ("--param", option)


@functools.cache
def _tell_volatile(compiler: str) -> tuple[str, ...]:
    """Flags for calls of their own at volatile accesses; none for compilers before GCC 11 and clang 11."""
    is_clang = "clang" in compiler_version(compiler)
    option = "tsan-distinguish-volatile=1"
    flags = ("-mllvm", f"-{option}") if is_clang else ("--param", option)
    test = [compiler, "-fsanitize=thread", *flags, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return flags if subprocess.run(test, capture_output=True, check=False).returncode == 0 else ()


@functools.cache
def sanitizer_flags(compiler: str) -> tuple[str, ...]:
    """Compiler flags that report memory accesses and undefined behaviour to functions of the runtime."""
    is_clang = "clang" in compiler_version(compiler)
    bounds = "array-bounds" if is_clang else "bounds-strict"
    whole = () if is_clang else ("-fno-tree-sra",)  # read a float4 as 16 bytes, not as four floats
    return (f"-fsanitize={','.join((*_SANITIZERS, bounds))}", *whole, *_entry_exit(compiler), *_tell_volatile(compiler))


def _cache() -> Path:
    return code_folder("simulator")


def _scratch() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(dir=_cache())
    except OSError as error:
        raise UserError(f"cannot write compiled code to {_cache()}: {error.strerror}; set CLLM_CACHE_DIR") from error


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _runtime_text() -> str:
    files = sorted(path for folder in (INCLUDE, RUNTIME) for path in folder.rglob("*.*") if path.is_file())
    return "".join(path.read_text(encoding="utf-8") for path in files)


def _source_file(code: str) -> Path:
    """Write the source to a file named by its content, so that line markers depend on the content alone."""
    path = _cache() / "sources" / f"{_digest(code)}.cu"
    if not path.is_file() or path.read_bytes() != code.encode():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(code.encode())
        os.replace(temporary, path)
    return path


def _run(command: Sequence[str], what: str, folder: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise UserError(f"the simulator cannot compile {what}: {_first_error(done.stderr)}")
    return done.stdout


def _first_error(messages: str) -> str:
    lines = [line for line in messages.splitlines() if "error" in line.lower()] or messages.splitlines()
    first = re.sub(r"\S*[0-9a-f]{32}\.cu:(\d+):(\d+):", r"line \1, column \2:", lines[0]) if lines else "no message"
    if "no such instruction" in messages or "asm" in first:
        first += " (inline PTX cannot be simulated: give it a second body under #ifdef CLLM_SIMULATOR)"
    return first


def _preprocess(compiler: str, path: Path, flags: Sequence[str]) -> str:
    headers = ["-I", str(INCLUDE), "-include", str(INCLUDE / "simulator.hpp")]
    return _run([compiler, "-E", "-x", "c++", *headers, *flags, str(path)], "the CUDA source")


def _compile(compiler: str, scratch: str, body: str, flags: Sequence[str], checked: bool, target: Path) -> None:
    text = Path(scratch) / "kernel.ii"
    text.write_text(body)
    objects = [str(Path(scratch) / "kernel.o"), *map(str, runtime_objects(checked))]
    _run([compiler, *flags, "-w", "-c", str(text), "-o", objects[0]], "the CUDA source")
    library = Path(scratch) / target.name
    _run([compiler, "-shared", *objects, "-o", str(library)], "the CUDA source")
    write_digest(target, [library])
    os.replace(library, target)


def runtime_objects(checked: bool) -> list[Path]:
    """The object files of the runtime, compiled once per compiler, processor and mode."""
    compiler = require_compiler()
    native, processor = native_flags()
    flags = (*_COMMON, *native, "-O2", "-std=c++17", *(("-DSIM_CHECKED",) if checked else ()))
    target = _cache() / f"runtime-{_digest(compiler_version(compiler), *flags, processor, _runtime_text())}"
    if not is_sound(target, sorted(target.glob("*.o"))):
        sources = sorted(str(path) for path in RUNTIME.glob("*.cpp") if checked or "check" not in path.name)
        with _scratch() as scratch:
            objects = Path(scratch) / "objects"
            objects.mkdir()
            _run([compiler, *flags, "-c", *sources], "its own runtime", objects)
            remove(target)
            write_digest(target, sorted(objects.glob("*.o")))
            with contextlib.suppress(OSError):  # another process may have been faster
                os.rename(objects, target)
    return sorted(target.glob("*.o"))
