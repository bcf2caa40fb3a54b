"""Decompresses a file as a stream, every frame of it; one that is cut off or damaged is an error, never a shorter text.

gzip, bzip2, xz by the standard library; Zstandard by Python 3.14's, else by the package `zstandard`, whose own reader
ends without a word after the first frame and where a file is cut off: frames are told apart here.
"""

from __future__ import annotations

import bz2
import importlib
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from cllm_gpu.utils.errors import UserError

_CHUNK_BYTES = 64 * 1024
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}


def compression_of(path: Path, head: bytes) -> str | None:
    """How a file is compressed, by its first bytes; None for one that is not. UserError if its name says otherwise."""
    found = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    named = _SUFFIXES.get(path.suffix.lower())
    if named and found != named and head:
        raise UserError(f"{path} is no {named} file, though its name says so: it begins with {head[:4].hex(' ')}")
    return found


def without_suffix(path: Path) -> Path:
    """The name of what is compressed in a file of this name."""
    return path.with_suffix("") if path.suffix.lower() in _SUFFIXES else path


class Decompressed(io.RawIOBase):
    """What a compressed file holds, to be read once from its beginning to its end. `file`: opened for it."""

    def __init__(self, file: IO[bytes], path: Path, kind: str) -> None:
        """UserError if there is nothing installed that reads `kind`; while reading, for what is damaged or cut off."""
        self._file, self._path, self._kind = file, path, kind
        self._make = _maker(kind, path)
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        """Fill `into` as far as there is something at once; 0 at the end."""
        while not self._output:
            if not self._input:
                self._input = self._file.read(_CHUNK_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise UserError(f"{self._path} is cut off: its last {self._kind} frame does not end")
                return 0
            self._decompress()
        taken = min(len(into), len(self._output))
        into[:taken] = self._output[:taken]
        self._output = self._output[taken:]
        return taken

    def _decompress(self) -> None:
        if self._frame is None:
            if self._kind == "gzip" and not self._input.strip(b"\0"):
                self._input = b""  # tar and tape writers fill up with zeros
                return
            self._frame = self._make()
        try:
            self._output, self._input = self._frame.decompress(self._input), b""
        except Exception as error:  # each library has an error of its own, zlib.error among them
            raise UserError(f"{self._path} is damaged: it is no {self._kind} file to its end ({error})") from error
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None


def _maker(kind: str, path: Path) -> Callable[[], Any]:
    """Makes a decompressor of one frame, with decompress(), eof and unused_data."""
    if kind == "gzip":
        return lambda: zlib.decompressobj(wbits=31)
    if kind == "bzip2":
        return bz2.BZ2Decompressor
    if kind == "xz":
        return lzma.LZMADecompressor
    for name in ("compression.zstd", "zstandard"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if name == "zstandard":
            return lambda: module.ZstdDecompressor().decompressobj()
        return lambda: module.ZstdDecompressor()
    raise UserError(f"{path} is compressed with Zstandard: pip install zstandard, or decompress it (zstd -d)")
