"""Writing safetensors files: straight from the arrays' memory, hashed on the way, synced before the name counts.

A file is 8 bytes with the header's length (little-endian), a JSON header of name → dtype, shape and byte range, and
the arrays one after the other (https://huggingface.co/docs/safetensors). The safetensors package is used to read; to
write, this saves a second pass over the file for its SHA-256 and a copy of arrays that are not contiguous all at
once, and lets a full disk be told from other errors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (NumPy knows bfloat16, which safetensors asks it for, only after this)
import numpy as np
from safetensors import SafetensorError, safe_open

from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors, write_fully

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_PIECE = 8 << 20
"""Bytes written or read at a time."""

Arrays = Mapping[str, np.ndarray[Any, Any]]


class DamagedError(UserError):
    """A file of a checkpoint that is missing, truncated, or of another content than was written."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file."""

    size: int
    """Bytes."""
    sha256: str
    """Of the whole file, hexadecimal."""


def write_tensors(path: Path, arrays: Arrays, *, written_for: str = "np") -> FileRecord:
    """Write a safetensors file and sync it. At most one array is copied at a time, and only if not contiguous.

    `written_for` is the entry "format" of its metadata: transformers loads no file without its own framework's, "pt".
    Raises OSError as the system does, TypeError for a dtype that safetensors cannot hold.
    """
    ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))  # keeps every array aligned
    return write_synced(path, _contents(ordered, written_for))


def write_synced(path: Path, pieces: Iterator[bytes | memoryview]) -> FileRecord:
    """Write the pieces to a new file, sync it, and say its size and SHA-256. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for piece in pieces:
            write_fully(file.fileno(), piece)
            digest.update(piece)
            size += len(piece)
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def tensors_size(arrays: Arrays) -> int:
    """Bytes of the file that `write_tensors` would write."""
    return len(_header(arrays)) + sum(array.nbytes for array in arrays.values())


def _header(arrays: Arrays, written_for: str = "np") -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": written_for}}
    start = 0
    for name, array in arrays.items():
        if array.dtype.name not in _CODES:
            raise TypeError(f"{name} is of dtype {array.dtype}, which a safetensors file cannot hold")
        stop = start + array.nbytes
        header[name] = {"dtype": _CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _contents(arrays: Arrays, written_for: str) -> Iterator[bytes | memoryview]:
    yield _header(arrays, written_for)
    for array in arrays.values():
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        data = np.ascontiguousarray(little).reshape(-1).view(np.uint8).data
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]


def verify_file(path: Path, record: FileRecord) -> None:
    """Raises DamagedError when the file is missing, of another size, or of another content than recorded."""
    if not path.is_file():
        raise DamagedError(f"{path} is missing: the checkpoint is incomplete; use another one")
    with clear_errors("read", path):
        size = path.stat().st_size
        if size != record.size:
            kind = "truncated" if size < record.size else "too long"
            raise DamagedError(f"{path} is {kind}: {size} bytes instead of {record.size}; use another checkpoint")
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    if digest.hexdigest() != record.sha256:
        raise DamagedError(f"{path} is damaged: its SHA-256 is not the manifest's; use another checkpoint")


def read_tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of a safetensors file, each a copy of its own. Raises UserError when it is not one."""
    return dict(each_tensor(path))


def each_tensor(path: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Names and arrays of a safetensors file, one at a time. Raises UserError when it is not one."""
    try:
        with clear_errors("read", path), safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise DamagedError(f"{path} is not a safetensors file: {error}") from error
