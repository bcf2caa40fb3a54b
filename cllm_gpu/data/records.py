"""The texts of a file of records: JSON lines, JSON, CSV, Parquet.

Each gives (text, bytes of the stream read so far): a record is a document, its text the field that was asked for.
"""

from __future__ import annotations

import codecs
import csv
import importlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cllm_gpu.utils.errors import UserError

LONGEST_RECORD_BYTES = 64 * 1024 * 1024
_CHUNK_BYTES = 64 * 1024
_SPACE = re.compile(r"[\s,]*")

Texts = Iterator[tuple[str, int]]


class NoSuchFieldError(UserError):
    """Records without the field that was asked for: a file of something else, where it is one of many."""


def missing_field(where: str, field: str, found: list[str]) -> NoSuchFieldError:
    """The error for records with the fields `found`, which has no text in `field`."""
    names = ", ".join(found[:8]) or "none"
    return NoSuchFieldError(
        f'{where}: no text in the field "{field}" (fields: {names}); --data.text-field names another'
    )


def checked(text: Any, where: str, field: str, found: list[str]) -> str:
    """`text`; UserError unless it is a text that UTF-8 can write."""
    if not isinstance(text, str):
        raise missing_field(where, field, found)
    if not text.isascii() and (lone := next((c for c in text if "\ud800" <= c <= "\udfff"), None)):
        raise UserError(f"{where}: lone surrogate U+{ord(lone):04X}, which UTF-8 cannot write")
    return text


def json_texts(file: IO[bytes], path: Path, field: str) -> Texts:
    """Of a JSON file: an array of objects, or objects one after the other, over lines or not."""
    values = _JsonValues(file, path)
    for number, value in enumerate(values, 1):
        where = f"{path}, record {number}"
        if not isinstance(value, dict):
            raise UserError(f'{where}: not a JSON object; each must be like {{"{field}": "..."}}')
        yield checked(value.get(field), where, field, list(value)), values.read


class _JsonValues:
    """The values of a JSON file, those of an array at its top one by one, in bounded memory."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._held = ""
        self._ended = False
        self.read = 0

    def _more(self, least: int) -> None:
        """Read on, by at least `least` bytes if there are so many."""
        wanted = max(_CHUNK_BYTES, least)
        chunk = self._file.read(wanted)
        self.read += len(chunk)
        self._ended = not chunk
        try:
            self._held += self._decode.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path} is not UTF-8 text: convert it to UTF-8") from error

    def _skip(self, pattern: re.Pattern[str] = _SPACE) -> None:
        """Drop what stands between two values."""
        while True:
            match = pattern.match(self._held)
            self._held = self._held[match.end() if match else 0 :]
            if self._held or self._ended:
                return
            self._more(0)

    def __iter__(self) -> Iterator[Any]:
        self._skip(re.compile(r"\s*"))
        array = self._held.startswith("[")
        if array:
            self._held = self._held[1:]
        while True:
            self._skip()
            if array and self._held.startswith("]"):
                self._held = self._held[1:]
                self._skip(re.compile(r"\s*"))
                if self._held:
                    raise UserError(f"{self._path}: something follows its array; give JSON lines or one array")
                return
            if not self._held:
                if array:
                    raise UserError(f"{self._path} is cut off: its array does not end")
                return
            yield self._value()

    def _value(self) -> Any:
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self._held)
                if end < len(self._held) or self._ended:
                    self._held = self._held[end:]
                    return value
            except json.JSONDecodeError as error:
                if self._ended:
                    raise UserError(f"{self._path}: not JSON ({error.msg}) in its last record") from error
                if len(self._held) - error.pos > _CHUNK_BYTES and not error.msg.startswith("Unterminated string"):
                    raise UserError(f"{self._path}: not JSON ({error.msg} near byte {self.read})") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self._path}: not JSON that can be read ({error})") from error
            if len(self._held) > LONGEST_RECORD_BYTES:
                raise UserError(f"{self._path}: a record is longer than {LONGEST_RECORD_BYTES} bytes")
            self._more(len(self._held))


def csv_texts(file: IO[bytes], path: Path, field: str) -> Texts:
    """Of a CSV file whose first row names its columns; tabs separate those of a .tsv file."""
    counted = _Counted(file)
    text = io.TextIOWrapper(io.BufferedReader(counted), encoding="utf-8-sig", newline="")
    csv.field_size_limit(LONGEST_RECORD_BYTES)
    rows = csv.reader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        names = next(rows, [])
        if field not in names:
            raise missing_field(f"{path}, first row", field, names)
        column = names.index(field)
        for row in rows:
            if len(row) != len(names):
                if not row:
                    continue
                raise UserError(f"{path}:{rows.line_num}: {len(row)} columns, the first row has {len(names)}")
            yield row[column], counted.read_bytes
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (near line {rows.line_num + 1}); convert it to UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: not CSV ({error})") from error
    finally:
        text.detach()


class _Counted(io.RawIOBase):
    """A file, and how many bytes of it were read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.read_bytes = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        data = self._file.read(min(len(into), _CHUNK_BYTES))
        into[: len(data)] = data
        self.read_bytes += len(data)
        return len(data)


def parquet_texts(path: Path, field: str, size: int) -> Texts:
    """Of a Parquet file, by pyarrow; UserError without it."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{path} is Parquet: pip install pyarrow, or write it as JSON lines") from None
    try:
        file = parquet.ParquetFile(path)
        names, rows, done = file.schema_arrow.names, file.metadata.num_rows, 0
        if field not in names:
            raise missing_field(str(path), field, names)
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0).to_pylist():
                done += 1
                yield checked(value, f"{path}, row {done}", field, names), size * done // rows
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise UserError(f"{path} cannot be read by pyarrow: {' '.join(str(error).split())}") from error
