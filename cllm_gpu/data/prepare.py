"""Tokenizes a text corpus, as a stream, into a folder with two shards; reuses the folder if nothing changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cllm_gpu.data.shards import VERSION, ShardHeader, ShardWriter, read_header
from cllm_gpu.data.sources import Corpus
from cllm_gpu.data.split import Part, SplitPiece, documents_needed, split_by_document, split_by_position
from cllm_gpu.data.tokenizers import Tokenizer
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import PARTIAL, clear_errors, remove, sync_folder

Progress = Callable[[int, int], None]
"""Called with (bytes done, total bytes)."""

SHARD_NAMES = {Part.TRAIN: "train.tokens", Part.VALIDATION: "validation.tokens"}
_ABANDONED_AFTER_SECONDS = 24 * 3600
_PROGRESS_BYTES = 1 << 20
_GROUP_BYTES = 1 << 20
_GROUP_PIECES = 1024


def prepared_folder(
    corpus: Corpus, tokenizer: Tokenizer, *, fraction: float, seed: int, cache: Path, progress: Progress | None
) -> tuple[Path, bytes]:
    """The folder with the corpus's shards, created unless it is in `cache`, and the identity its shards must have.

    The identity is a SHA-256 of the format version, the corpus (names, sizes and modification times of its files), the
    tokenizer, the fraction and the seed. Safe with concurrent processes: each writes a temporary folder, and the first
    to finish renames it. A folder that lacks a shard is created again. Raises UserError for invalid text, and if the
    cache cannot be written.
    """
    identity = corpus_identity(corpus, tokenizer, fraction, seed)
    _remove_abandoned(cache)
    target = cache / f"tokens-{identity.hex()[:24]}"
    if target.is_dir():
        if all((target / name).exists() for name in SHARD_NAMES.values()):
            return target, identity
        remove(target)  # a damaged shard was deleted; remove the rest of the folder
    with _temporary_folder(cache) as folder:
        write_shards(corpus, tokenizer, folder, fraction=fraction, seed=seed, identity=identity, progress=progress)
        _rename_into_place(folder, target)
    return target, identity


def prepared_with(cache: Path, wanted: str) -> tuple[Path, bytes] | None:
    """The folder in `cache` whose shards have the identity `wanted` of `Dataset.identity`, and theirs; None if none."""
    for folder in sorted(cache.glob("tokens-*")):
        try:
            train, validation = (read_header(folder / SHARD_NAMES[part]) for part in (Part.TRAIN, Part.VALIDATION))
        except UserError:
            continue
        if wanted == "/".join(f"{header.tokens} {header.checksum.hex()}" for header in (train, validation)):
            return folder, train.identity
    return None


def new_folder(
    corpus: Corpus, tokenizer: Tokenizer, target: Path, *, fraction: float, seed: int, progress: Progress | None
) -> None:
    """Create the folder `target` with the corpus's shards, which can be used as a data source.

    The folder appears only when it is complete. Raises UserError if `target` exists or cannot be written, or if the
    text is invalid.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists already: name a new folder for the shards, or move it away")
    identity = corpus_identity(corpus, tokenizer, fraction, seed)
    with _temporary_folder(target.parent) as folder:
        write_shards(corpus, tokenizer, folder, fraction=fraction, seed=seed, identity=identity, progress=progress)
        with clear_errors("write", target):
            sync_folder(folder)
            os.rename(folder, target)
            sync_folder(target.parent)


def corpus_identity(corpus: Corpus, tokenizer: Tokenizer, fraction: float, seed: int) -> bytes:
    """SHA-256 of everything that determines the content of the shards."""
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
    """Write train.tokens and validation.tokens to `folder`, holding only a few pieces of text in memory."""
    headers = {part: _header(part, tokenizer, identity) for part in Part}
    total = corpus.total_bytes + (corpus.held_out.total_bytes if corpus.held_out else 0)
    with contextlib.ExitStack() as stack:
        writers = {p: stack.enter_context(ShardWriter(folder / SHARD_NAMES[p], headers[p])) for p in Part}
        _stream(split_pieces(corpus, fraction, seed), writers, tokenizer, throttled_progress(progress, total))
        for header in headers.values():
            header.skipped = corpus.skipped
    for part in Part:
        if not headers[part].text_bytes:
            raise UserError(
                f"{corpus.name} has too little text ({total} bytes) to hold out {fraction:g} for validation: "
                f"the {SHARD_NAMES[part].partition('.')[0]} part is empty"
            )


def split_pieces(corpus: Corpus, fraction: float, seed: int) -> Iterator[SplitPiece]:
    """All text of a corpus, in pieces with their part: the input of shards and of tokenizer training."""
    pieces = corpus.pieces()
    if corpus.held_out is not None:
        return _held_out_apart(corpus, corpus.held_out)
    if corpus.has_documents(documents_needed(fraction)):
        return split_by_document(pieces, fraction, seed)
    return split_by_position(pieces, fraction, corpus.total_bytes)


def _held_out_apart(corpus: Corpus, held_out: Corpus) -> Iterator[SplitPiece]:
    """All of one corpus to learn from, all of another for validation."""
    for part, one, base in ((Part.TRAIN, corpus, 0), (Part.VALIDATION, held_out, corpus.total_bytes)):
        for piece in one.pieces():
            yield SplitPiece(part, piece.text, piece.text_bytes, base + piece.end, piece.last)
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
    routed: Iterator[SplitPiece], writers: dict[Part, ShardWriter], tokenizer: Tokenizer, tell: Callable[[int], None]
) -> None:
    for group in _groups(routed):
        encoded = tokenizer.encode_many([piece.text for piece in group])
        for piece, tokens in zip(group, encoded, strict=True):
            writers[piece.part].add(tokens, piece.text_bytes)
            if piece.last:
                writers[piece.part].end_document()
        tell(group[-1].end)


def _groups(routed: Iterator[SplitPiece]) -> Iterator[list[SplitPiece]]:
    """The pieces in groups large enough to encode in parallel and small enough for memory."""
    group: list[SplitPiece] = []
    size = 0
    for piece in routed:
        group.append(piece)
        size += piece.text_bytes
        if size >= _GROUP_BYTES or len(group) >= _GROUP_PIECES:
            yield group
            group, size = [], 0
    if group:
        yield group


def throttled_progress(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that calls `progress` for every megabyte and at the end; does nothing if `progress` is None."""
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        if progress and (done - told >= _PROGRESS_BYTES or (done == total and told < total)):
            told = done
            progress(done, total)

    return tell


@contextlib.contextmanager
def _temporary_folder(cache: Path) -> Iterator[Path]:
    """Yields a temporary folder in `cache`, removed on exit unless renamed. Removes old ones of killed processes."""
    with clear_errors("write", cache):
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        folder = cache / f"tokens-{_machine()}-{os.getpid()}-{secrets.token_hex(8)}{PARTIAL}"
        folder.mkdir()
    try:
        yield folder
    finally:
        remove(folder)


def _remove_abandoned(cache: Path) -> None:
    """Remove what killed preparations left: of a process of this machine that has ended, or of an old one anywhere."""
    for folder in cache.glob(f"tokens-*{PARTIAL}"):
        with contextlib.suppress(OSError):  # another process may be removing it too
            if _has_ended(folder.name) or time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                remove(folder)


def _machine() -> str:
    """Tells the machines that share a cache apart."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _has_ended(name: str) -> bool:
    """Whether the process that made the partial folder `name` is known to have ended."""
    parts = name.split("-")
    if os.name == "nt" or len(parts) != 4 or parts[1] != _machine() or not parts[2].isdecimal():
        return False
    try:
        os.kill(int(parts[2]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        return False
    return False


def _rename_into_place(folder: Path, target: Path) -> None:
    """Rename a finished folder to `target`, unless another process has created it first."""
    with clear_errors("write", target):
        sync_folder(folder)
        try:
            os.rename(folder, target)
        except OSError:
            if not target.is_dir():
                raise
        sync_folder(target.parent)
