"""Cache records of compiled CUDA sources, so that a second process neither preprocesses nor compiles them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cllm_gpu.simulator.source import KernelDeclaration
from cllm_gpu.utils.library_cache import is_sound


@dataclass(frozen=True)
class CompiledSource:
    """A compiled CUDA source: its library and its kernels, in the order of `sim_kernel_<i>`."""

    library: Path
    kernels: tuple[KernelDeclaration, ...]
    expressions: tuple[str, ...]
    variables: tuple[str, ...]
    """Names of its __device__ and __constant__ variables, in the order of `sim_variable_<i>`."""


def read(record: Path) -> CompiledSource | None:
    """Read a record; None if it is missing or damaged, or if a header has changed."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        library = record.parent / found["library"]
        if library.parent != record.parent or not is_sound(library, [library]):
            return None
        if any(_hash(Path(path)) != digest for path, digest in found["headers"].items()):
            return None
        kernels = [
            KernelDeclaration(**entry | {"parameters": tuple(entry["parameters"])}) for entry in found["kernels"]
        ]
        return CompiledSource(library, tuple(kernels), tuple(found["expressions"]), tuple(found["variables"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(record: Path, built: CompiledSource, headers: Sequence[str]) -> None:
    """Write `built` to the file `record`. headers: the files that the source includes."""
    content = {
        "library": built.library.name,
        "headers": {path: _hash(Path(path)) for path in headers},
        "kernels": [dataclasses.asdict(kernel) for kernel in built.kernels],
        "expressions": built.expressions,
        "variables": built.variables,
    }
    temporary = record.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, record)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
