"""Train/validation split: a pure function of the corpus, the fraction f and the seed.

By document, if there are at least 1/f documents: from the k-th group of consecutive documents, [round(k/f),
round((k+1)/f)), one is drawn by (seed, k). Validation is therefore never empty and has a fraction f of the documents.
Otherwise by position: validation is the last part of the corpus, a fraction f of its bytes. The document at the cut is
divided at the first blank line after the cut within the same piece of text (about 64 KiB), else at the first line end,
else between two characters. No text is in both parts in either case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from cllm_gpu.data.random import hash_words
from cllm_gpu.data.text import Piece
from cllm_gpu.utils.errors import UserError


class Part(IntEnum):
    """The two parts of a corpus; the numbers are stored in shards."""

    TRAIN = 0
    VALIDATION = 1


@dataclass(frozen=True)
class SplitPiece:
    """A piece of text and its part. last: the piece ends a document."""

    part: Part
    text: str
    text_bytes: int
    end: int
    last: bool


def require_fraction(fraction: float) -> None:
    """Raises UserError unless 0 < fraction <= 0.5."""
    if not 0 < fraction <= 0.5:
        raise UserError(f"validation_fraction is {fraction}; it must be above 0 and at most 0.5")


def documents_needed(fraction: float) -> int:
    """The minimum number of documents for a split by document: the size of the first group."""
    return round(1 / fraction)


def part_of_document(index: int, fraction: float, seed: int) -> Part:
    """The part of document number `index`, by the rule above."""
    group = int(index * fraction)
    while round(group / fraction) > index:
        group -= 1
    while round((group + 1) / fraction) <= index:
        group += 1
    return Part.VALIDATION if index == _drawn(group, fraction, seed) else Part.TRAIN


@functools.lru_cache(maxsize=4)
def _drawn(group: int, fraction: float, seed: int) -> int:
    """The document of a group that is held out."""
    first, end = round(group / fraction), round((group + 1) / fraction)
    return first + hash_words(seed, group, 2) % (end - first)


def split_by_document(pieces: Iterable[Piece], fraction: float, seed: int) -> Iterator[SplitPiece]:
    """Every piece with the part of its document."""
    index, part = 0, part_of_document(0, fraction, seed)
    for piece in pieces:
        yield SplitPiece(part, piece.text, piece.text_bytes, piece.end, piece.last)
        if piece.last:
            index += 1
            part = part_of_document(index, fraction, seed)


def split_by_position(pieces: Iterable[Piece], fraction: float, total_bytes: int) -> Iterator[SplitPiece]:
    """Every piece before or after byte (1 - fraction) * total_bytes; the piece at that byte is cut in two."""
    target = int(total_bytes * (1 - fraction))
    for piece in pieces:
        if piece.start >= target:
            yield SplitPiece(Part.VALIDATION, piece.text, piece.text_bytes, piece.end, piece.last)
        elif piece.end <= target:
            yield SplitPiece(Part.TRAIN, piece.text, piece.text_bytes, piece.end, piece.last or piece.end == target)
        else:
            head, tail = _cut(piece, target)
            yield SplitPiece(Part.TRAIN, head, len(head.encode()), piece.end, last=True)
            yield SplitPiece(Part.VALIDATION, tail, len(tail.encode()), piece.end, piece.last)


def _cut(piece: Piece, target: int) -> tuple[str, str]:
    """The piece's text before and after the cut; the second part is blank only if more of the document follows."""
    data = piece.text.encode("utf-8")
    wanted = len(data) * (target - piece.start) // (piece.end - piece.start)
    latest = (len(data.rstrip()) or len(data)) - 1 if piece.last else len(data)
    finders: tuple[Callable[[bytes, int], int], ...] = (_after_blank_line, _after_line_end, _after_character)
    for find in finders:
        at = find(data, wanted)
        if 0 < at <= latest:
            return data[:at].decode("utf-8"), data[at:].decode("utf-8")
    return "", piece.text


def _after_blank_line(data: bytes, wanted: int) -> int:
    found = data.find(b"\n\n", max(wanted - 2, 0))
    return found + 2 if found >= 0 else -1


def _after_line_end(data: bytes, wanted: int) -> int:
    found = data.find(b"\n", max(wanted - 1, 0))
    return found + 1 if found >= 0 else -1


def _after_character(data: bytes, wanted: int) -> int:
    """`wanted`, moved back to the start of a character (a byte that is not a continuation byte 10xxxxxx)."""
    while 0 < wanted < len(data) and data[wanted] & 0xC0 == 0x80:
        wanted -= 1
    return wanted
