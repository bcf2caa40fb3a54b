"""The tokenizer `patterns`: one token per letter of the data set `patterns`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_gpu.data.tokenizers.base import checked_ids
from cllm_gpu.utils.errors import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class PatternTokenizer:
    """One id per letter A to Z (0 to 25) and 26 for the end of text; white space is ignored, anything else an error."""

    name = "patterns"
    vocabulary = len(LETTERS) + 1
    end_of_text = len(LETTERS)
    ends = (len(LETTERS),)
    unused: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    earlier_fingerprints: tuple[str, ...] = ()
    fingerprint = hashlib.sha256(b"cllm_gpu tokenizer: letters A to Z, 26 ends the text").hexdigest()

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        letters = "".join(text.split())
        for letter in letters:
            if letter not in LETTERS:
                raise UserError(f"the patterns tokenizer knows the letters A to Z and white space, not {letter!r}")
        return np.frombuffer(letters.encode("ascii"), dtype=np.uint8).astype(np.uint32) - np.uint32(ord("A"))

    def encode_many(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        array = checked_ids(ids, self.vocabulary)
        return (array[array != self.end_of_text] + ord("A")).astype(np.uint8).tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("ascii")

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "patterns"}
