"""The tokenizer `bytes`, the default: one token per UTF-8 byte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_gpu.data.tokenizers.base import checked_ids, utf8


class ByteTokenizer:
    """One id per UTF-8 byte (0 to 255) and 256 for the end of text: lossless for any text."""

    name = "bytes"
    vocabulary = 257
    end_of_text = 256
    ends = (256,)
    unused: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    earlier_fingerprints: tuple[str, ...] = ()
    fingerprint = hashlib.sha256(b"cllm_gpu tokenizer: UTF-8 bytes, 256 ends the text").hexdigest()

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.uint32)

    def encode_many(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        array = checked_ids(ids, self.vocabulary)
        return array[array != self.end_of_text].astype(np.uint8).tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "bytes"}
