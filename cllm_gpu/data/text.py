"""Streams a file as pieces of text of bounded size, in bounded memory."""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors

CHUNK_BYTES = 64 * 1024  # larger strings of varying sizes fragment the heap: 512 KiB takes 100 MB more for 2 GB of text
LONGEST_RECORD_BYTES = 64 * 1024 * 1024
TEXT_FIELD = "text"
_BOUNDARIES_TRIED = 200


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


def file_pieces(path: Path, base: int, size: int) -> Iterator[Piece]:
    """The pieces of a text file, which is one document of `size` bytes starting at byte `base` of the corpus.

    Pieces end at line ends if possible (see `cut_position`). Characters across read boundaries stay whole, and line
    ends are not converted. Raises UserError with the byte offset for text that is not UTF-8.
    """
    held: Piece | None = None
    start = base
    for text in _cut_texts(_decoded(path, size)):
        if held:
            yield held
        length = utf8_length(text)
        held = Piece(text, length, start, start + length, last=False)
        start += length
    if held:
        yield dataclasses.replace(held, last=True)


def utf8_length(text: str) -> int:
    """UTF-8 length of `text` in bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _decoded(path: Path, size: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")
    read, pending = 0, 0
    try:
        with clear_errors("read", path), path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                text = decoder.decode(chunk)
                read, pending = read + len(chunk), len(decoder.getstate()[0])
                yield text
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, read - pending + error.start) from error
    if read != size:
        raise UserError(f"{path} changed while it was read ({size} bytes became {read}): run again")


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


def record_pieces(path: Path, base: int, size: int) -> Iterator[Piece]:
    """The pieces of a JSON Lines file, whose documents are the fields `text`; blank lines and empty texts are skipped.

    Raises UserError naming file and line for a line that is not JSON, lacks the field, or is longer than 64 MiB.
    """
    start = 0
    with clear_errors("read", path), path.open("rb") as file:
        for number, line in enumerate(_lines(file, path), 1):
            end = start + len(line)
            if text := _record_text(line, number, start, path):
                yield from _record(text, base + start, base + end)
            start = end
    if start != size:
        raise UserError(f"{path} changed while it was read ({size} bytes became {start}): run again")


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    number = 0
    while line := file.readline(LONGEST_RECORD_BYTES + 1):
        number += 1
        if len(line) > LONGEST_RECORD_BYTES:
            raise UserError(f"{path}:{number}: line is longer than {LONGEST_RECORD_BYTES} bytes; is it JSON lines?")
        yield line


def _record_text(line: bytes, number: int, start: int, path: Path) -> str:
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
        raise UserError(f'{path}:{number}: not a JSON object; each line must be like {{"{TEXT_FIELD}": "..."}}')
    text = record.get(TEXT_FIELD)
    if not isinstance(text, str):
        found = ", ".join(list(record)[:8]) or "none"
        raise UserError(f'{path}:{number}: no text in the field "{TEXT_FIELD}" (fields: {found})')
    if not text.isascii() and (lone := next((c for c in text if "\ud800" <= c <= "\udfff"), None)):
        raise UserError(f"{path}:{number}: lone surrogate U+{ord(lone):04X}, which UTF-8 cannot write")
    return text


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
