"""Where text comes from: finds the files of a source and streams their documents as pieces of text.

A document is a text file, a line of a JSON-lines file (its field `text`), or a module of the standard library.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cllm_gpu.data.text import Piece, file_pieces, record_pieces
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors, describe_error

JSON_LINES = (".jsonl", ".ndjson")
_SNIFFED_BYTES = 8192


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus: its path, the name that identifies it, its size in bytes and time of change."""

    path: Path
    name: str
    size: int
    changed_ns: int

    @property
    def is_json_lines(self) -> bool:
        return self.path.suffix.lower() in JSON_LINES


@dataclass
class Corpus:
    """The files of a source in their fixed order. `skipped` counts files left out because they are not text."""

    name: str
    files: list[SourceFile]
    skip_undecodable: bool = False
    skipped: int = 0
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        facts = [self.name, *(f"{file.name}\0{file.size}\0{file.changed_ns}" for file in self.files)]
        self.identity = hashlib.sha256("\n".join(facts).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(file.size for file in self.files)

    def pieces(self) -> Iterator[Piece]:
        """All documents as pieces of text; positions are bytes from the beginning of the first file.

        Raises UserError for a file that cannot be read, that is not UTF-8, or that changes under the reading.
        """
        base = 0
        for file in self.files:
            yield from self._file(file, base)
            base += file.size

    def sample(self, most: int = 16) -> list[str]:
        """The first piece of text of up to `most` files, spread evenly; of what cannot be read, nothing."""
        texts = []
        for file in self.files[:: -(-len(self.files) // most)]:
            with contextlib.suppress(UserError):
                texts += [piece.text for piece in itertools.islice(self._file(file, 0), 1)]
        return texts

    def _file(self, file: SourceFile, base: int) -> Iterator[Piece]:
        if file.is_json_lines:
            yield from record_pieces(file.path, base, file.size)
        elif self.skip_undecodable and not _is_utf8(file.path):
            self.skipped += 1
        else:
            yield from file_pieces(file.path, base, file.size)

    def has_documents(self, count: int) -> bool:
        """Whether there are at least `count` documents; reads no further than needed."""
        found = 0
        for file in self.files:
            if file.is_json_lines:
                for piece in record_pieces(file.path, 0, file.size):
                    found += piece.last
                    if found >= count:
                        return True
            else:
                found += 1
            if found >= count:
                return True
        return False


def find_corpus(source: str) -> Corpus:
    """The corpus of "stdlib", a text or JSON-lines file, a folder, or a glob; UserError where there is no text."""
    if source == "stdlib":
        return _standard_library()
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return _corpus(source, [_source_file(path, str(path.resolve()))])
    if path.is_dir():
        return _folder(path)
    if glob.has_magic(source):
        return _matches(source)
    raise UserError(f"no data at {source!r}: give stdlib, patterns, a text or .jsonl file, a folder, or a glob")


def _corpus(source: str, found: list[SourceFile], skipped: int = 0) -> Corpus:
    """A corpus of the files that are not empty; UserError where all are."""
    files = [file for file in found if file.size]
    if not files:
        what = f"{source} is empty" if len(found) == 1 else f"all {len(found)} files of {source} are empty"
        raise UserError(f"{what}: give at least one file with text")
    return Corpus(source, files, skipped=skipped)


def _source_file(path: Path, name: str) -> SourceFile:
    with clear_errors("read", path):
        facts = path.stat()
    return SourceFile(path, name, facts.st_size, facts.st_mtime_ns)


def _walk(folder: Path, left_out: frozenset[str]) -> Iterator[Path]:
    """Files below `folder` in the order of their parts, hidden ones and folders named in `left_out` left out."""

    def refuse(error: OSError) -> None:
        raise UserError(describe_error(error, "read", Path(error.filename))) from error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in left_out)
        for name in sorted(names):
            if not name.startswith(".") and (path := Path(place, name)).is_file():
                yield path


def _standard_library() -> Corpus:
    """Every .py file of the running Python's standard library, third-party packages left out."""
    folder = Path(sysconfig.get_path("stdlib"))
    left_out = frozenset({"site-packages", "dist-packages", "__pycache__"})
    paths = [path for path in _walk(folder, left_out) if path.suffix == ".py"] if folder.is_dir() else []
    if not paths:
        raise UserError(f"the standard library has no .py files at {folder}: name a text file or folder as data")
    corpus = _corpus("stdlib", [_source_file(path, path.relative_to(folder).as_posix()) for path in paths])
    corpus.name = f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
    corpus.skip_undecodable = True
    return corpus


def _folder(folder: Path) -> Corpus:
    """All text files below a folder: not hidden, and no NUL among their first 8192 bytes."""
    every = list(_walk(folder, frozenset({"__pycache__"})))
    texts = [path for path in every if _looks_like_text(path)]
    if not texts:
        raise UserError(f"the folder {folder} holds no text files")
    files = [_source_file(path, str(path.resolve())) for path in texts]
    return _corpus(str(folder), files, skipped=len(every) - len(texts))


def _matches(pattern: str) -> Corpus:
    paths = sorted(Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True))
    files = [path for path in paths if path.is_file()]
    texts = [path for path in files if _looks_like_text(path)]
    if not texts:
        raise UserError(f"no text file matches {pattern}")
    return _corpus(
        pattern, [_source_file(path, str(path.resolve())) for path in texts], skipped=len(files) - len(texts)
    )


def _looks_like_text(path: Path) -> bool:
    with clear_errors("read", path), path.open("rb") as file:
        return b"\0" not in file.read(_SNIFFED_BYTES)


def _is_utf8(path: Path) -> bool:
    """Whether a file (small: it is read whole) is UTF-8."""
    with clear_errors("read", path):
        content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
