"""Finds the files of a text source and streams their documents as pieces of text.

A document is a text file, a record (the field `text`) of a JSON Lines, JSON, CSV or Parquet file, or a module of the
standard library. Compressed files are decompressed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cllm_gpu.data.compressed import without_suffix
from cllm_gpu.data.records import NoSuchFieldError
from cllm_gpu.data.text import RECORDS, Piece, TextOptions, is_utf8, pieces_of, what_it_is
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors, describe_error

STDLIB = "stdlib"
_BLOCK_BYTES, _BLOCKS = 4096, 16
"""Blocks of a large file, spread evenly, whose content tells it from another of the same name, size and time."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus: its path, identifying name, size in bytes and modification time.

    content: SHA-256 of all of it, or of samples if it is large
    """

    path: Path
    name: str
    size: int
    changed_ns: int
    content: str = ""

    @property
    def holds_records(self) -> bool:
        """Whether it has a document for each of its records."""
        return without_suffix(self.path).suffix.lower() in RECORDS


@dataclass
class Corpus:
    """The files of a source in a fixed order. skipped: number of files that are not text.

    held_out:  text for validation, all of it (None: a fraction of this corpus)
    is_path:   whether the name is a path, as of every source but the standard library
    """

    name: str
    files: list[SourceFile]
    skip_undecodable: bool = False
    skipped: int = 0
    options: TextOptions = field(default_factory=TextOptions)
    held_out: Corpus | None = None
    is_path: bool = True
    _unread: set[Path] = field(default_factory=set)

    @property
    def identity(self) -> str:
        """SHA-256 of all that determines its text: of its files name, size, modification time and content."""
        # a path means one text whichever folder it is given from
        name = os.path.abspath(os.path.expanduser(self.name)) if self.is_path else self.name
        facts = [name, *(f"{f.name}\0{f.size}\0{f.changed_ns}\0{f.content}" for f in self.files)]
        facts += [repr(self.options), self.held_out.identity if self.held_out else ""]
        return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Total size of the files in bytes."""
        return sum(file.size for file in self.files)

    def pieces(self) -> Iterator[Piece]:
        """All documents as pieces of text; positions are bytes from the start of the first file.

        Raises UserError for a file that cannot be read, that is not UTF-8, or that changes while it is read.
        """
        base = 0
        for file in self.files:
            yield from self._file(file, base)
            base += file.size

    def sample(self, most: int = 16) -> list[str]:
        """The first 64 KiB or so of up to `most` files, spread evenly; of what cannot be read, nothing."""
        texts = []
        for file in self.files[:: -(-len(self.files) // most)]:
            taken = 0
            with contextlib.suppress(UserError):
                for piece in self._file(file, 0):
                    texts.append(piece.text)
                    taken += piece.text_bytes
                    if taken >= _BLOCK_BYTES * _BLOCKS // 2:
                        break
        return texts

    def _file(self, file: SourceFile, base: int) -> Iterator[Piece]:
        if file.path in self._unread:
            return
        if self.skip_undecodable and not file.holds_records and not is_utf8(file.path):
            self._skip(file)
            return
        begun = False
        try:
            for piece in pieces_of(file.path, base, file.size, self.options):
                begun = True
                yield piece
        except NoSuchFieldError:
            if begun or not self.skip_undecodable:
                raise
            self._skip(file)  # one of many, and of something else: a settings file

    def _skip(self, file: SourceFile) -> None:
        self._unread.add(file.path)
        self.skipped += 1

    def has_documents(self, count: int) -> bool:
        """Whether there are at least `count` documents; reads no further than needed."""
        found = 0
        for file in self.files:
            if file.holds_records or self.options.separator is not None:
                for piece in self._file(file, 0):
                    found += piece.last
                    if found >= count:
                        return True
            else:
                found += 1
            if found >= count:
                return True
        return False


def find_corpus(source: str, options: TextOptions | None = None) -> Corpus:
    """The corpus of "stdlib", a file of text or records, a folder, or a glob. Raises UserError if there is no text."""
    corpus = _find(source)
    corpus.options = dataclasses.replace(options or TextOptions(), keep_mark=source == STDLIB)
    return corpus


def _find(source: str) -> Corpus:
    if source == STDLIB:
        return _standard_library()
    path = Path(os.path.expanduser(source))
    if path.is_file():
        if what := what_it_is(path):
            raise UserError(f"{path} is no text but {what}")
        return _corpus(source, [_source_file(path, str(path.resolve()))])
    if path.is_dir():
        return _folder(path)
    if glob.has_magic(source):
        return _matches(source)
    raise UserError(f"no data at {source!r}: give stdlib, patterns, a text or .jsonl file, a folder, or a glob")


def _corpus(source: str, found: list[SourceFile], skipped: int = 0, *, of_many: bool = False) -> Corpus:
    """A corpus of the nonempty files. Raises UserError if all are empty. of_many: skip files that are not text."""
    files = [file for file in found if file.size]
    if not files:
        what = f"{source} is empty" if len(found) == 1 else f"all {len(found)} files of {source} are empty"
        raise UserError(f"{what}: give at least one file with text")
    return Corpus(source, files, skip_undecodable=of_many, skipped=skipped)


def _source_file(path: Path, name: str) -> SourceFile:
    with clear_errors("read", path), path.open("rb") as file:
        facts = os.fstat(file.fileno())
        digest = hashlib.sha256()
        if facts.st_size <= _BLOCK_BYTES * _BLOCKS:
            digest.update(file.read())
        else:
            for n in range(_BLOCKS):
                file.seek((facts.st_size - _BLOCK_BYTES) * n // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return SourceFile(path, name, facts.st_size, facts.st_mtime_ns, digest.hexdigest())


def _walk(folder: Path, left_out: frozenset[str]) -> Iterator[Path]:
    """Files below `folder`, sorted by path components, without hidden ones and folders named in `left_out`."""

    def refuse(error: OSError) -> None:
        raise UserError(describe_error(error, "read", Path(error.filename))) from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in left_out)
        for name in sorted(names):
            if not name.startswith(".") and (path := Path(place, name)).is_file():
                yield path


def _standard_library() -> Corpus:
    """Every .py file of the running Python's standard library, without third-party packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = frozenset({"site-packages", "dist-packages", "__pycache__"})
    paths = [path for path in _walk(folder, left_out) if path.suffix == ".py"] if folder.is_dir() else []
    if not paths:
        raise UserError(f"the standard library has no .py files at {folder}: name a text file or folder as data")
    files = [_source_file(path, path.relative_to(folder).as_posix()) for path in paths]
    corpus = _corpus(STDLIB, files, of_many=True)
    corpus.is_path = False
    corpus.name = f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
    return corpus


def _folder(folder: Path) -> Corpus:
    """All files of text or records below a folder: not hidden, and without binary data in their first 8192 bytes."""
    every = list(_walk(folder, frozenset({"__pycache__"})))
    texts = [path for path in every if _looks_like_text(path)]
    if not texts:
        raise UserError(f"the folder {folder} holds no text files")
    files = [_source_file(path, str(path.resolve())) for path in texts]
    return _corpus(str(folder), files, skipped=len(every) - len(texts), of_many=True)


def _matches(pattern: str) -> Corpus:
    paths = sorted(Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True))
    files = [path for path in paths if path.is_file()]
    texts = [path for path in files if _looks_like_text(path)]
    if not texts:
        raise UserError(f"no text file matches {pattern}")
    return _corpus(
        pattern,
        [_source_file(path, str(path.resolve())) for path in texts],
        skipped=len(files) - len(texts),
        of_many=True,
    )


def _looks_like_text(path: Path) -> bool:
    """Whether one of several files is read; a damaged one is, and reported when it is read."""
    try:
        return what_it_is(path) is None
    except UserError:
        return True
