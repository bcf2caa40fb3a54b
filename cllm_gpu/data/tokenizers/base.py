"""The tokenizer protocol, and checks that all tokenizers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cllm_gpu.utils.errors import UserError


class Tokenizer(Protocol):
    """The interface that training, generation and checkpoints use."""

    @property
    def name(self) -> str:
        """The name given by the user: "bytes", "patterns", or the path of its file."""

    @property
    def vocabulary(self) -> int:
        """Number of ids, including the end of text."""

    @property
    def end_of_text(self) -> int:
        """The id that follows every document."""

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end generation, `end_of_text` first."""

    @property
    def unused(self) -> tuple[int, ...]:
        """Ids below `vocabulary` that no token has."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids that a prompt begins with: those a model from elsewhere was trained to find before a text."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notices for the user who chose it."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256; equal fingerprints mean that two tokenizers encode text identically."""

    @property
    def earlier_fingerprints(self) -> tuple[str, ...]:
        """What earlier versions wrote for it."""

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Ids of `text`, (n,); never contains `end_of_text`. Raises UserError for text that cannot be encoded."""

    def encode_many(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """`encode` of each text, in parallel if the tokenizer supports it."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD, ends of text are omitted."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of `ids`, for streaming: a token may end inside a character."""

    def as_dict(self) -> dict[str, Any]:
        """The tokenizer as JSON values, for `tokenizer_from_dict`."""


def utf8(text: str) -> bytes:
    """UTF-8 bytes of `text`. Raises UserError for a lone surrogate, which encodes no character."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"text holds the lone surrogate U+{code:04X} at character {error.start}, which UTF-8 cannot write"
        ) from error


def checked_ids(ids: Iterable[int], vocabulary: int) -> npt.NDArray[np.int64]:
    """`ids` as an int64 array (n,). Raises UserError for an id outside [0, vocabulary)."""
    array = np.fromiter(ids, dtype=np.int64)
    outside = (array < 0) | (array >= vocabulary)
    if outside.any():
        raise UserError(f"token id {array[outside][0]} is outside the tokenizer's vocabulary of {vocabulary}")
    return array
