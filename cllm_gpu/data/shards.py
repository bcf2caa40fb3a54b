"""Token shards: a header of 512 bytes followed by the tokens, uint16 or uint32, little-endian.

Offset  Field
0       magic "CLLMTOKS"; uint32 version; uint32 header size; uint32 bytes per token (2 or 4); uint32 part
24      uint64 vocabulary size, end-of-text id, number of tokens, documents, text bytes, skipped files
72      SHA-256 of the tokenizer (its fingerprint), of the source (its identity), and of the tokens
168     name of the tokenizer, UTF-8, zero-padded (96 bytes; only zeros in shards of earlier versions)
480     SHA-256 of the preceding 480 bytes

The checksum of the tokens is the SHA-256 over the SHA-256 of each block of 4 MiB, so that it can be verified as a
stream on all cores (about 1.4 GB/s each with SHA instructions): opening a shard verifies every byte. A shard is written
under a temporary name, synced and renamed, so a file under its final name is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from cllm_gpu.data.token_file import TokenFile
from cllm_gpu.data.tokens import Tokens
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors

MAGIC = b"CLLMTOKS"
VERSION = 1
HEADER_BYTES = 512
BLOCK_BYTES = 4 * 1024 * 1024
_FIELDS = struct.Struct("<8sIIII6Q32s32s32s96s")
_NAME_BYTES = 96
_SIGNED_BYTES = HEADER_BYTES - 32
_NO_HASH = bytes(32)


@dataclass
class ShardHeader:
    """The header of a shard. `identity`, `fingerprint` and `checksum` are SHA-256 digests of 32 bytes."""

    part: int
    vocabulary: int
    end_of_text: int
    fingerprint: bytes
    identity: bytes
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    skipped: int = 0
    checksum: bytes = _NO_HASH
    tokenizer: str = ""
    """Name of the tokenizer, for messages; long names are stored without their beginning."""

    @property
    def dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        """Token dtype, little-endian: uint16 if the vocabulary size is at most 65,536, else uint32."""
        return np.dtype("<u2") if self.vocabulary <= 1 << 16 else np.dtype("<u4")

    def pack(self) -> bytes:
        """The 512 bytes of the header."""
        fields = _FIELDS.pack(
            *(MAGIC, VERSION, HEADER_BYTES, self.dtype.itemsize, self.part),
            *(self.vocabulary, self.end_of_text, self.tokens, self.documents, self.text_bytes, self.skipped),
            *(self.fingerprint, self.identity, self.checksum, _name_bytes(self.tokenizer)),
        ).ljust(_SIGNED_BYTES, b"\0")
        return fields + hashlib.sha256(fields).digest()


def _name_bytes(name: str) -> bytes:
    data = name.encode("utf-8", "replace")
    if len(data) <= _NAME_BYTES:
        return data
    mark = "…".encode()
    return mark + data[len(mark) - _NAME_BYTES :].decode("utf-8", "ignore").encode()


class ShardWriter:
    """Writes a shard as a stream; a context manager. `close` completes the shard; an exception leaves it incomplete."""

    def __init__(self, path: Path, header: ShardHeader) -> None:
        """Open `path` for writing. Every write raises UserError if the disk is full or the folder is not writable."""
        self.path, self.header = path, header
        self._block = np.empty(BLOCK_BYTES // header.dtype.itemsize, dtype=header.dtype)
        self._used = 0
        self._inside_document = False
        self._digests = hashlib.sha256()
        with clear_errors("write", path):
            self._file = path.open("wb")
        self._write(bytes(HEADER_BYTES))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        self._abandon()

    def add(self, tokens: npt.NDArray[np.uint32], text_bytes: int) -> None:
        """Append `tokens`, the encoding of `text_bytes` bytes of text, to the current document."""
        self.header.text_bytes += text_bytes
        self._inside_document = self._inside_document or len(tokens) > 0
        while len(tokens):
            room = self._block[self._used : self._used + len(tokens)]
            room[:] = tokens[: len(room)]
            self._used += len(room)
            tokens = tokens[len(room) :]
            self._flush_if_full()

    def end_document(self) -> None:
        """Append the end of text, unless the current document is empty."""
        if self._inside_document:
            self._block[self._used] = self.header.end_of_text  # there is room: full blocks are flushed immediately
            self._used += 1
            self.header.documents += 1
            self._inside_document = False
            self._flush_if_full()

    def close(self) -> None:
        """Write the remaining tokens and the header, and sync the file to disk."""
        self._flush()
        self.header.checksum = self._digests.digest()
        with self._abandoned_on_error():
            self._file.seek(0)
            self._file.write(self.header.pack())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _abandon(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk; report the first error
            self._file.close()

    def _flush_if_full(self) -> None:
        if self._used == len(self._block):
            self._flush()

    def _flush(self) -> None:
        if self._used:
            block = self._block[: self._used].data
            self._digests.update(hashlib.sha256(block).digest())
            self._write(block)
            self.header.tokens += self._used
            self._used = 0

    def _write(self, data: bytes | memoryview) -> None:
        with self._abandoned_on_error():
            self._file.write(data)

    @contextlib.contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        try:
            with clear_errors("write", self.path):
                yield
        except UserError:
            self._abandon()
            raise


def read_header(path: Path) -> ShardHeader:
    """The header of a shard, whose tokens are not looked at; UserError where it is damaged or of another size."""
    with clear_errors("read", path):
        size = path.stat().st_size
        with path.open("rb") as file:
            return _unpack(path, file.read(HEADER_BYTES), size)


def open_shard(path: Path) -> tuple[ShardHeader, Tokens]:
    """The header and the tokens of a shard; verifies every byte. Raises UserError if anything is wrong."""
    with clear_errors("read", path):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
        header = _unpack(path, head, size)
        if _checksum(path, size) != header.checksum:
            raise UserError(f"{path} is damaged: its tokens do not match their checksum; delete it and prepare again")
        tokens = TokenFile(
            path,
            dtype=header.dtype,
            offset=HEADER_BYTES,
            count=header.tokens,
            same=lambda: _checksum(path, size) == header.checksum,
        )
        return header, tokens


def is_shard(path: Path) -> bool:
    """Whether a file begins with a shard's magic bytes; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _unpack(path: Path, head: bytes, size: int) -> ShardHeader:
    if not head.startswith(MAGIC):
        raise UserError(f"{path} is not a token shard: it does not begin with {MAGIC.decode()}")
    version = int.from_bytes(head[8:12], "little")
    if version > VERSION:
        raise UserError(f"{path} has format version {version}, newer than this program's {VERSION}: update cllm-gpu")
    if len(head) < HEADER_BYTES:
        raise UserError(f"{path} is truncated: {size} bytes are less than its header; delete it and prepare again")
    if hashlib.sha256(head[:_SIGNED_BYTES]).digest() != head[_SIGNED_BYTES:]:
        raise UserError(f"{path} is damaged: its header does not match its checksum; delete it and prepare again")
    _, _, _, itemsize, part, *counts, fingerprint, identity, checksum, name = _FIELDS.unpack(head[: _FIELDS.size])
    vocabulary, end_of_text, tokens, documents, text_bytes, skipped = counts
    header = ShardHeader(
        *(part, vocabulary, end_of_text, fingerprint, identity, tokens, documents, text_bytes, skipped, checksum),
        tokenizer=name.rstrip(b"\0").decode("utf-8", "replace"),
    )
    wanted = HEADER_BYTES + tokens * itemsize
    if size != wanted:
        state = "truncated" if size < wanted else "too long"
        raise UserError(f"{path} is {state}: {size} bytes instead of {wanted}; delete it and prepare again")
    return header


def _checksum(path: Path, size: int) -> bytes:
    """The checksum of the tokens, computed block by block on up to 8 threads (hashlib releases the GIL)."""
    starts = range(HEADER_BYTES, size, BLOCK_BYTES)
    workers = max(1, min(8, os.cpu_count() or 1, len(starts)))
    shares = [starts[len(starts) * n // workers : len(starts) * (n + 1) // workers] for n in range(workers)]
    digests = hashlib.sha256()
    with ThreadPoolExecutor(workers) as pool:
        for part in pool.map(lambda share: _block_digests(path, share), shares):
            digests.update(part)
    return digests.digest()


def _block_digests(path: Path, starts: range) -> bytes:
    if not starts:
        return b""
    buffer = bytearray(BLOCK_BYTES)
    view = memoryview(buffer)
    digests = []
    with path.open("rb", buffering=0) as file:
        file.seek(starts[0])
        for _ in starts:
            filled = 0
            while filled < BLOCK_BYTES and (read := file.readinto(view[filled:])):
                filled += read
            digests.append(hashlib.sha256(view[:filled]).digest())
    return b"".join(digests)
