"""llm.c's .bin shards: 256 int32 (magic, version, number of tokens, zeros), then the tokens, little-endian.

Two kinds: magic 20240520, version 1, uint16, of GPT-2's tokenizer; magic 20240801, version 7, uint32, of Llama 3's
(llm.c, dev/data/data_common.py). They have no checksum: the size is checked when a file is opened, ids when they are
read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cllm_gpu.data.split import Part
from cllm_gpu.data.token_file import TokenFile
from cllm_gpu.data.tokens import Tokens, TokenSource
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors

_HEADER_BYTES = 1024


@dataclass(frozen=True)
class Kind:
    """One kind of .bin shard. vocabulary: vocabulary size of the model family it was made for."""

    family: str
    version: int
    dtype: str
    vocabulary: int


KINDS = {
    20240520: Kind("GPT-2", 1, "<u2", 50257),
    20240801: Kind("Llama 3", 7, "<u4", 128256),
}


_BARE = {"uint16": Kind("nanoGPT", 0, "<u2", 50257), "uint32": Kind("nanoGPT", 0, "<u4", 128256)}
"""Files without a header; the vocabulary is that of the tokenizer they usually are of."""
_VALIDATION = {"val", "valid", "validation", "dev"}


def open_llmc(
    name: str,
    paths: Iterable[Path],
    *,
    fraction: float,
    vocabulary: int | None,
    held_out: Sequence[Path] = (),
    dtype: str | None = None,
) -> tuple[TokenSource, TokenSource]:
    """Training and validation streams of .bin files, sorted by name.

    Files whose name contains the word "val", "valid", "validation" or "dev" (delimited by dots, dashes and underscores)
    are validation, those with "test" are left out of a set, all others are training; if there is only one sort, the
    last `fraction` of the tokens is held out. held_out: files that are the validation part (empty: see above).
    vocabulary: overrides the family's (None: the family's). dtype: of files without a header, bare token ids. Raises
    UserError for a file that is not such a shard, is truncated, or is of another kind than the others.
    """
    chosen = sorted(paths)
    chosen = [path for path in chosen if len(chosen) == 1 or "test" not in _words(path)]
    parts_of = {path: Part.TRAIN if held_out else _part(path) for path in chosen}
    parts_of |= dict.fromkeys(held_out, Part.VALIDATION)
    opened = [(path, *(_open(path) if dtype is None else _open_bare(path, dtype))) for path in parts_of]
    if not opened:
        raise UserError(f"{name} holds no shards but of a test set: name the file itself")
    kinds = {kind for _, kind, _ in opened}
    if len(kinds) > 1:
        raise UserError(f"{name} mixes shards of {' and '.join(sorted(kind.family for kind in kinds))}: give one kind")
    size = vocabulary if vocabulary is not None else next(iter(kinds)).vocabulary
    parts: dict[Part, list[Tokens]] = {part: [] for part in Part}
    for path, _, tokens in opened:
        parts[parts_of[path]].append(tokens)
    if all(parts.values()):
        train, validation = (
            TokenSource(f"{name} ({part.name.lower()})", parts[part], vocabulary=size) for part in Part
        )
        return train, validation
    arrays = [*parts[Part.TRAIN], *parts[Part.VALIDATION]]
    total = sum(len(array) for array in arrays)
    cut = total - max(1, int(total * fraction))
    return (
        TokenSource(f"{name} (train)", arrays, vocabulary=size, stop=cut),
        TokenSource(f"{name} (validation)", arrays, vocabulary=size, start=cut),
    )


def is_llmc(path: Path) -> bool:
    """Whether a file begins with one of llm.c's magic numbers; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return int.from_bytes(file.read(4), "little") in KINDS
    except OSError:
        return False


def _part(path: Path) -> Part:
    return Part.VALIDATION if _words(path) & _VALIDATION else Part.TRAIN


def _words(path: Path) -> set[str]:
    return set(re.split(r"[._-]", path.name.lower()))


def _open_bare(path: Path, dtype: str) -> tuple[Kind, TokenFile]:
    """A file of nothing but token ids: of nanoGPT."""
    if is_llmc(path):
        raise UserError(f"{path} is a shard of llm.c, which says what it holds: leave data.dtype out")
    kind = _BARE[dtype]
    with clear_errors("read", path):
        size, width = path.stat().st_size, np.dtype(kind.dtype).itemsize
        if size < width or size % width:
            raise UserError(f"{path} has {size} bytes, which are no whole number of {dtype}: truncated?")
        return kind, TokenFile(path, dtype=kind.dtype, offset=0, count=size // width)


def _open(path: Path) -> tuple[Kind, TokenFile]:
    with clear_errors("read", path), path.open("rb") as file:
        size = path.stat().st_size
        head = file.read(_HEADER_BYTES)
    if len(head) < _HEADER_BYTES:
        raise UserError(f"{path} is truncated: {size} bytes are less than the header of an llm.c shard")
    magic, version, count = np.frombuffer(head, dtype="<i4", count=3).tolist()
    kind = KINDS.get(magic)
    if kind is None:
        known = " or ".join(map(str, KINDS))
        raise UserError(
            f"{path} is not an llm.c shard: its magic number is {magic}, not {known}; "
            "for bare token ids, as nanoGPT writes them, say --data.dtype uint16"
        )
    if version != kind.version:
        raise UserError(f"{path} has version {version}; llm.c shards of {kind.family} have version {kind.version}")
    dtype = np.dtype(kind.dtype)
    wanted = _HEADER_BYTES + count * dtype.itemsize
    if count < 1 or size != wanted:
        raise UserError(f"{path} says it holds {count} tokens, which are {wanted} bytes, but it has {size}: truncated?")
    with clear_errors("read", path):
        return kind, TokenFile(path, dtype=dtype, offset=_HEADER_BYTES, count=count)
