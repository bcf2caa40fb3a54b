"""Compiles C++ sources of this project to a shared library once, and finds it again by the hash of all that went in."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.library_cache import code_folder, is_sound, write_digest


@functools.cache
def find_compiler() -> str | None:
    """Path of the C++ compiler ($CXX, then c++, g++, clang++), or None if none is found."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def require_compiler() -> str:
    """The C++ compiler's path. Raises UserError, with how to install one, if none is found."""
    path = find_compiler()
    if path is None:
        raise UserError("no C++ compiler found: install g++ or clang++ (Debian: apt install g++), or set CXX to one")
    return path


@functools.cache
def compiler_version(compiler: str) -> str:
    """First line of `compiler --version`."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip()


def compile_library(sources: Sequence[Path], headers: Sequence[Path], flags: Sequence[str], key: str = "") -> Path:
    """Compile `sources` into one shared library and return its path, from the cache if nothing changed.

    `headers` are hashed, not compiled; `key` adds whatever else the result depends on (for flags such as
    -march=native: the processor). The file appears under its final name only when complete, so processes may race.
    A library that differs from its SHA-256 is compiled again. Raises UserError with the compiler's first error line, or
    if the cache is not the user's own.
    """
    compiler = require_compiler()
    digest = hashlib.sha256("\0".join([compiler_version(compiler), *flags, key]).encode())
    for path in (*sources, *headers):
        digest.update(path.read_bytes())
    folder = code_folder("compiled")
    target = folder / f"{sources[0].stem}-{digest.hexdigest()[:24]}.so"
    if is_sound(target, [target]):
        return target
    try:
        logging.getLogger(__name__).info("compiling %s for this machine, once …", sources[0].name)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            _run([compiler, "-shared", "-fPIC", *flags, *map(str, sources), "-o", str(built)], sources[0])
            with open(built, "rb+") as file:
                os.fsync(file.fileno())
            write_digest(target, [built])
            os.replace(built, target)
    except OSError as error:
        raise UserError(f"cannot write compiled code to {folder}: {error.strerror}; set CLLM_CACHE_DIR") from error
    return target


def _run(command: list[str], source: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise UserError(f"{command[0]} cannot compile {source.name}: {lines[0] if lines else 'no message'}")
