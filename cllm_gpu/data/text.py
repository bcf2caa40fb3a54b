"""Streams a file as pieces of text of bounded size, in bounded memory."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cllm_gpu.data.compressed import Decompressed, compression_of, without_suffix
from cllm_gpu.data.records import (
    LONGEST_RECORD_BYTES,
    Texts,
    checked,
    csv_texts,
    json_texts,
    parquet_texts,
)
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors

CHUNK_BYTES = 64 * 1024  # larger strings of varying sizes fragment the heap: 512 KiB takes 100 MB more for 2 GB of text
TEXT_FIELD = "text"
JSON_LINES = (".jsonl", ".ndjson")
RECORDS = (*JSON_LINES, ".json", ".csv", ".tsv", ".parquet")
PARQUET = b"PAR1"
_SNIFFED_BYTES = 8192
_NO_TEXT = {
    b"PK\x03\x04": "a zip file (or an office document): unpack it first",
    b"%PDF": "a PDF: extract its text first",
    b"ARROW1": "an Arrow file: write it as JSON lines or Parquet",
    b"\x93NUMPY": "a NumPy array: write token ids as a .bin file, for --data.dtype",
    b"\xff\xfe": "UTF-16: convert it to UTF-8",
    b"\xfe\xff": "UTF-16: convert it to UTF-8",
    b"\x89HDF": "an HDF5 file: write its texts as JSON lines",
    b"SQLite": "a database: write its texts as JSON lines",
}
"""First bytes of files that hold no text as it is → what they are, and what would be right."""
_BOUNDARIES_TRIED = 200


@dataclass(frozen=True)
class TextOptions:
    """How texts are read."""

    field: str = TEXT_FIELD
    """Of records, the one that holds the text."""
    separator: str | None = None
    """Written between two documents of a text, white space around it included (None: a text is one document)."""
    keep_mark: bool = False
    """A byte order mark at the beginning is text: in the standard library, whose tokens stay what they were."""


@dataclass(frozen=True)
class Piece:
    """A piece of a document.

    text_bytes:  UTF-8 length of the text in bytes
    start, end:  range of bytes in the corpus (for a JSON record: a proportional part of the line)
    last:        whether the piece ends its document
    """

    text: str
    text_bytes: int
    start: int
    end: int
    last: bool


def pieces_of(path: Path, base: int, size: int, options: TextOptions) -> Iterator[Piece]:
    """The documents of a file of `size` bytes whose first byte is byte `base` of the corpus, as pieces.

    Its name says what is in it: records (JSON lines, JSON, CSV, Parquet), each a document, or one text. What is
    compressed is decompressed, and its pieces stand for bytes of the file as it is. UserError, one line, for what is
    none of these, damaged, cut off, or not UTF-8.
    """
    kind = without_suffix(path).suffix.lower()
    with clear_errors("read", path), opened(path) as (stream, raw):
        if kind in JSON_LINES:
            pieces = record_pieces(stream, path, base, options.field)
        elif kind in RECORDS:
            pieces = _pieces_of_texts(_texts(stream, raw, path, kind, size, options.field), base)
        else:
            pieces = file_pieces(stream, path, base, keep_mark=options.keep_mark)
        if stream is not raw:
            pieces = _placed(pieces, raw, base)
        yield from pieces if options.separator is None else separated(pieces, options.separator)
        if kind != ".parquet" and raw.tell() != size:
            raise UserError(f"{path} changed while it was read ({size} bytes became {raw.tell()}): run again")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file's bytes, decompressed, from the beginning; and the file itself."""
    with path.open("rb") as raw:
        kind = compression_of(path, raw.read(8))
        raw.seek(0)
        if kind is None:
            yield raw, raw
        else:
            yield io.BufferedReader(Decompressed(raw, path, kind), CHUNK_BYTES), raw


def what_it_is(path: Path) -> str | None:
    """What a file is that holds no text; None for one that looks like text or records. UserError if damaged."""
    with clear_errors("read", path), opened(path) as (stream, _):
        head = stream.read(_SNIFFED_BYTES)
    if head.startswith(PARQUET) or without_suffix(path).suffix.lower() == ".parquet":
        return None
    for magic, what in _NO_TEXT.items():
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    return "binary data: give UTF-8 text, JSON lines, JSON, CSV or Parquet" if b"\0" in head else None


def is_utf8(path: Path) -> bool:
    """Whether all of a file, decompressed, is UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with clear_errors("read", path), opened(path) as (stream, _):
            while chunk := stream.read(1 << 20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _texts(stream: IO[bytes], raw: IO[bytes], path: Path, kind: str, size: int, field: str) -> Texts:
    if kind == ".json":
        return json_texts(stream, path, field)
    if kind == ".parquet":
        if stream is not raw:
            raise UserError(f"{path} is compressed Parquet: decompress it first")
        return parquet_texts(path, field, size)
    return csv_texts(stream, without_suffix(path), field)


def _pieces_of_texts(texts: Texts, base: int) -> Iterator[Piece]:
    start = base
    for text, read in texts:
        if text:
            yield from _record(text, start, base + read)
        start = base + read


def _placed(pieces: Iterable[Piece], raw: IO[bytes], base: int) -> Iterator[Piece]:
    """Pieces of a decompressed stream, with their places in the file `raw`."""
    start = base
    for piece in pieces:
        end = base + raw.tell()
        yield dataclasses.replace(piece, start=start, end=end)
        start = end


def separated(pieces: Iterable[Piece], mark: str) -> Iterator[Piece]:
    """Documents that `mark` ends, wherever it stands in the text; white space around it is dropped."""
    carried, inside, start = "", False, 0
    for piece in pieces:
        *ended, rest = (carried + piece.text).split(mark)
        start, step = max(start, piece.start), (piece.end - piece.start) // (len(ended) + 1)
        for part in ended:
            text = part.rstrip() if inside else part.strip()
            if text or inside:
                yield Piece(text, utf8_length(text), start, start + step, last=True)
            inside, start = False, start + step
        rest = rest if inside else rest.lstrip()
        cut = len(rest)
        if not piece.last:
            cut = max(0, cut - len(mark) + 1)
            while cut and rest[cut - 1].isspace():
                cut -= 1
        text, carried = rest[:cut], rest[cut:]
        if text or (inside and piece.last):
            yield Piece(text, utf8_length(text), start, piece.end, last=piece.last)
            inside = not piece.last
        start = piece.end


def file_pieces(stream: IO[bytes], path: Path, base: int, *, keep_mark: bool = False) -> Iterator[Piece]:
    """The pieces of a text, which is one document starting at byte `base` of the corpus.

    Pieces end at line ends if possible (see `cut_position`). Characters across read boundaries stay whole, and line
    ends are not converted; a byte order mark at the beginning is skipped unless `keep_mark`. Raises UserError with the
    byte offset for text that is not UTF-8.
    """
    held: Piece | None = None
    start = base
    for text in _cut_texts(_decoded(stream, path)):
        if held:
            yield held
        length = utf8_length(text)
        end = start + length
        if start == base and not keep_mark:
            text = text.removeprefix("\ufeff")
            length = utf8_length(text)
        held = Piece(text, length, start, end, last=False)
        start = end
    if held and (held.text or held.start != base):
        yield dataclasses.replace(held, last=True)


def utf8_length(text: str) -> int:
    """UTF-8 length of `text` in bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _decoded(stream: IO[bytes], path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")
    read, pending = 0, 0
    try:
        while chunk := stream.read(CHUNK_BYTES):
            text = decoder.decode(chunk)
            read, pending = read + len(chunk), len(decoder.getstate()[0])
            yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, read - pending + error.start) from error


def _not_utf8(path: Path, offset: int) -> UserError:
    return UserError(f"{path} is not UTF-8 text: invalid byte sequence at byte {offset}; convert it to UTF-8")


def _cut_texts(texts: Iterator[str]) -> Iterator[str]:
    """The same text, cut at `cut_position` instead of where a read ended; no piece is empty, short texts stay whole."""
    carried = ""
    for text in texts:
        if cut := cut_position(carried):
            yield carried[:cut]
        carried = carried[cut:] + text
    if carried:
        yield carried


def cut_position(text: str) -> int:
    """A position in (0, len(text)] at which cutting `text` does not change its tokens; 0 if `text` is empty.

    The last line end between two characters that are not white space, where the pre-tokenization patterns of byte-level
    tokenizers cut too. Otherwise the last line end, otherwise the end of the text.
    """
    position = len(text) - 1
    for _ in range(_BOUNDARIES_TRIED):
        position = text.rfind("\n", 0, max(position, 0))
        if position < 1:
            break
        if not text[position - 1].isspace() and not text[position + 1].isspace():
            return position + 1
    return text.rfind("\n") + 1 or len(text)


def record_pieces(stream: IO[bytes], path: Path, base: int, field: str = TEXT_FIELD) -> Iterator[Piece]:
    """The fields `field` of all JSON lines, each a document; blank lines and empty texts are skipped.

    Raises UserError naming file and line for a line that is not JSON, lacks the field, or is longer than 64 MiB.
    """
    start = 0
    for number, line in enumerate(_lines(stream, path), 1):
        end = start + len(line)
        if text := _record_text(line, number, start, path, field):
            yield from _record(text, base + start, base + end)
        start = end


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    number = 0
    while line := file.readline(LONGEST_RECORD_BYTES + 1):
        number += 1
        if len(line) > LONGEST_RECORD_BYTES:
            raise UserError(f"{path}:{number}: line is longer than {LONGEST_RECORD_BYTES} bytes; is it JSON lines?")
        yield line


def _record_text(line: bytes, number: int, start: int, path: Path, field: str) -> str:
    """The text of one line; "" if it is blank."""
    if not line.strip():
        return ""
    try:
        record = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, start + error.start) from error
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise UserError(f"{path}:{number}: not JSON ({reason}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise UserError(f'{path}:{number}: not a JSON object; each line must be like {{"{field}": "..."}}')
    return checked(record.get(field), f"{path}:{number}", field, list(record))


def _record(text: str, start: int, end: int) -> Iterator[Piece]:
    """The text of a record in pieces of bounded size, each with a proportional part of the bytes [start, end)."""
    if len(text) <= CHUNK_BYTES:
        yield Piece(text, utf8_length(text), start, end, last=True)
        return
    done = 0
    for piece in _cut_texts(text[i : i + CHUNK_BYTES] for i in range(0, len(text), CHUNK_BYTES)):
        position = start + (end - start) * done // len(text)
        done += len(piece)
        reached = start + (end - start) * done // len(text)
        yield Piece(piece, utf8_length(piece), position, reached, last=done == len(text))
