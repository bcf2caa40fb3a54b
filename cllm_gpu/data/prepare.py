"""Turns a corpus of text into a folder with two shards, as a stream, and finds it again when nothing changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cllm_gpu.data.shards import VERSION, ShardHeader, ShardWriter
from cllm_gpu.data.sources import Corpus
from cllm_gpu.data.split import Part, Routed, documents_needed, split_by_document, split_by_position
from cllm_gpu.data.tokenizers import Tokenizer
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import PARTIAL, clear_errors, remove, sync_folder

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

SHARD_NAMES = {Part.TRAIN: "train.tokens", Part.VALIDATION: "validation.tokens"}
_ABANDONED_AFTER_SECONDS = 24 * 3600
_PROGRESS_BYTES = 1 << 20
_GROUP_BYTES = 1 << 20
_GROUP_PIECES = 1024


def prepared_folder(
    corpus: Corpus, tokenizer: Tokenizer, *, fraction: float, seed: int, cache: Path, progress: Progress | None
) -> tuple[Path, bytes]:
    """The folder with the corpus's shards, made now unless it is in `cache`, and the identity its shards must have.

    The identity is a SHA-256 of the format's version, the corpus (names, sizes and times of change of its files), the
    tokenizer, the fraction and the seed. Processes may race: each writes a folder of its own, the first to finish
    gives it the final name. A folder that lost a shard is made again. UserError for bad text and where the cache cannot
    be written.
    """
    identity = _identity(corpus, tokenizer, fraction, seed)
    target = cache / f"tokens-{identity.hex()[:24]}"
    if target.is_dir():
        if all((target / name).exists() for name in SHARD_NAMES.values()):
            return target, identity
        remove(target)  # someone deleted a damaged shard; what is left of the folder is in the way
    with _unfinished_folder(cache) as folder:
        write_shards(corpus, tokenizer, folder, fraction=fraction, seed=seed, identity=identity, progress=progress)
        _publish(folder, target)
    return target, identity


def new_folder(
    corpus: Corpus, tokenizer: Tokenizer, target: Path, *, fraction: float, seed: int, progress: Progress | None
) -> None:
    """Make `target`, a folder with the corpus's shards that is itself a source of data.

    It is complete or not there. UserError where `target` exists, cannot be written, or the text is bad.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already: name a new folder for the shards, or remove it first")
    identity = _identity(corpus, tokenizer, fraction, seed)
    with _unfinished_folder(target.parent) as folder:
        write_shards(corpus, tokenizer, folder, fraction=fraction, seed=seed, identity=identity, progress=progress)
        with clear_errors("write", target):
            os.rename(folder, target)
            sync_folder(target.parent)


def _identity(corpus: Corpus, tokenizer: Tokenizer, fraction: float, seed: int) -> bytes:
    """SHA-256 of all that decides on the shards' content."""
    facts = f"{VERSION}\n{corpus.identity}\n{tokenizer.fingerprint}\n{fraction!r}\n{seed}\n{corpus.skip_undecodable}"
    return hashlib.sha256(facts.encode()).digest()


def write_shards(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    fraction: float,
    seed: int,
    identity: bytes,
    progress: Progress | None,
) -> None:
    """Write train.tokens and validation.tokens into `folder`, in memory bounded by a few pieces of text."""
    headers = {part: _header(part, tokenizer, identity) for part in Part}
    total = corpus.total_bytes + (corpus.held_out.total_bytes if corpus.held_out else 0)
    with contextlib.ExitStack() as stack:
        writers = {p: stack.enter_context(ShardWriter(folder / SHARD_NAMES[p], headers[p])) for p in Part}
        _stream(split_pieces(corpus, fraction, seed), writers, tokenizer, throttled(progress, total))
        for header in headers.values():
            header.skipped = corpus.skipped
    for part in Part:
        if not headers[part].text_bytes:
            raise UserError(
                f"{corpus.name} has too little text ({total} bytes) to hold out {fraction:g} for validation: "
                f"the {SHARD_NAMES[part].partition('.')[0]} part is empty"
            )


def split_pieces(corpus: Corpus, fraction: float, seed: int) -> Iterator[Routed]:
    """All text of a corpus, as pieces with their sides: what shards are made from and tokenizers learn from."""
    pieces = corpus.pieces()
    if corpus.held_out is not None:
        return _held_out_apart(corpus, corpus.held_out)
    if corpus.has_documents(documents_needed(fraction)):
        return split_by_document(pieces, fraction, seed)
    return split_by_position(pieces, fraction, corpus.total_bytes)


def _held_out_apart(corpus: Corpus, held_out: Corpus) -> Iterator[Routed]:
    """All of one corpus to learn from, all of another for validation."""
    for part, one, base in ((Part.TRAIN, corpus, 0), (Part.VALIDATION, held_out, corpus.total_bytes)):
        for piece in one.pieces():
            yield Routed(part, piece.text, piece.text_bytes, base + piece.end, piece.last)
        corpus.skipped += one.skipped if one is held_out else 0


def _header(part: Part, tokenizer: Tokenizer, identity: bytes) -> ShardHeader:
    return ShardHeader(
        part=part,
        vocabulary=tokenizer.vocabulary,
        end_of_text=tokenizer.end_of_text,
        fingerprint=bytes.fromhex(tokenizer.fingerprint),
        identity=identity,
        tokenizer=tokenizer.name,
    )


def _stream(
    routed: Iterator[Routed], writers: dict[Part, ShardWriter], tokenizer: Tokenizer, tell: Callable[[int], None]
) -> None:
    for group in _groups(routed):
        encoded = tokenizer.encode_many([piece.text for piece in group])
        for piece, tokens in zip(group, encoded, strict=True):
            writers[piece.part].add(tokens, piece.text_bytes)
            if piece.last:
                writers[piece.part].end_document()
        tell(group[-1].end)


def _groups(routed: Iterator[Routed]) -> Iterator[list[Routed]]:
    """The pieces in groups large enough to encode on several processors, and small enough for the memory."""
    group: list[Routed] = []
    size = 0
    for piece in routed:
        group.append(piece)
        size += piece.text_bytes
        if size >= _GROUP_BYTES or len(group) >= _GROUP_PIECES:
            yield group
            group, size = [], 0
    if group:
        yield group


def throttled(progress: Progress | None, total: int) -> Callable[[int], None]:
    """`progress` for every megabyte and at the end; a no-operation without it."""
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        if progress and (done - told >= _PROGRESS_BYTES or (done == total and told < total)):
            told = done
            progress(done, total)

    return tell


@contextlib.contextmanager
def _unfinished_folder(cache: Path) -> Iterator[Path]:
    """A new folder in `cache` to write in, gone afterwards unless renamed. Old ones of killed runs are removed."""
    with clear_errors("write", cache):
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        folder = cache / f"tokens-{os.getpid()}-{secrets.token_hex(8)}{PARTIAL}"
        folder.mkdir()
    try:
        yield folder
    finally:
        remove(folder)


def _remove_abandoned(cache: Path) -> None:
    for folder in cache.glob(f"tokens-*{PARTIAL}"):
        with contextlib.suppress(OSError):  # another process may be removing it too
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                remove(folder)


def _publish(folder: Path, target: Path) -> None:
    """Give a finished folder its final name, unless another process did so first."""
    with clear_errors("write", target):
        try:
            os.rename(folder, target)
        except OSError:
            if not target.is_dir():
                raise
        sync_folder(target.parent)
