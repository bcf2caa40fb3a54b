"""Tokenizers of the library `tokenizers`, from a Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_gpu.data.tokenizers.base import checked_ids, utf8
from cllm_gpu.ops.reference.embedding import MAXIMUM_VOCABULARY
from cllm_gpu.utils.errors import UserError

END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<end_of_text>")
"""Names of the end-of-text token: the first of these in a vocabulary is used."""


class HuggingFaceTokenizer:
    """A tokenizer.json of the library `tokenizers`.

    The end of text is the first of END_OF_TEXT_NAMES in its vocabulary. Special tokens that occur in a text are encoded
    as plain text, no special tokens are added, and the file's truncation and padding are disabled.
    """

    def __init__(self, json_text: str, name: str) -> None:
        """json_text: content of a tokenizer.json; name: for messages. Raises UserError if the content is invalid."""
        self._json = json_text
        self.name = name.encode("utf-8", "replace").decode("utf-8")  # a path may contain lone surrogates
        settings, end_name = _parse_settings(json_text, name)
        self._tokenizer = _build(settings, name)
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(ids.values()) + 1
        self.end_of_text = ids[end_name]
        self.fingerprint = hashlib.sha256(b"cllm_gpu tokenizer: huggingface\0" + json_text.encode("utf-8")).hexdigest()
        if self.vocabulary > MAXIMUM_VOCABULARY:
            raise UserError(f"{name} has {self.vocabulary} ids; the largest vocabulary is {MAXIMUM_VOCABULARY}")
        added = {token["id"]: token["content"] for token in settings.get("added_tokens") or []}
        self._bytes = _byte_level_table(ids, added) if _is_byte_level(settings.get("decoder")) else None

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        for text in texts:
            utf8(text)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        many = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        if any((ids == self.end_of_text).any() for ids in many):
            raise UserError("the tokenizer turns plain text into its end-of-text token; mark that token as special")
        return many

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of `ids`. Byte-level tokenizers decode each token exactly; others decode `ids` as a text."""
        array = checked_ids(ids, self.vocabulary)
        wanted = array[array != self.end_of_text].tolist()
        if self._bytes is None:
            return self._tokenizer.decode(wanted, skip_special_tokens=False).encode("utf-8")
        return b"".join(self._bytes.get(i, b"") for i in wanted)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def name_of(self, token: int) -> str:
        """The spelling of a token in the vocabulary."""
        return str(self._tokenizer.id_to_token(token))

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "huggingface", "name": self.name, "json": self._json}


def _parse_settings(json_text: str, name: str) -> tuple[dict[str, Any], str]:
    """The file as a dictionary in which the end-of-text token is marked special, and the name of that token."""
    try:
        settings = json.loads(json_text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON (line {error.lineno}: {error.msg}): give a tokenizer.json") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise UserError(f"{name} has no model: give a tokenizer.json of the library tokenizers")
    added = settings.get("added_tokens") or []
    vocabulary = settings["model"].get("vocab") or {}
    listed = (entry[0] if isinstance(entry, list) else entry for entry in vocabulary)  # Unigram lists [piece, score]
    known = {token.get("content") for token in added} | set(listed)
    for end_name in END_OF_TEXT_NAMES:
        if end_name in known:
            for token in added:
                token["special"] = token.get("special", False) or token.get("content") == end_name
            return settings, end_name
    raise UserError(f"{name} has no end-of-text token: one of {' '.join(END_OF_TEXT_NAMES)} must be in its vocabulary")


def _build(settings: dict[str, Any], name: str) -> Any:
    """The library's tokenizer for `settings`. Raises UserError for an invalid file (the library raises Exception)."""
    import tokenizers  # slow to import, and not needed for bytes

    try:
        built = tokenizers.Tokenizer.from_str(json.dumps(settings))
    except Exception as error:
        raise UserError(f"{name} cannot be read by the library tokenizers {tokenizers.__version__}: {error}") from error
    built.no_truncation()
    built.no_padding()
    built.encode_special_tokens = True
    return built


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if not decoder:
        return False
    if decoder.get("type") == "Sequence":
        return any(_is_byte_level(part) for part in decoder.get("decoders", []))
    return decoder.get("type") == "ByteLevel"


def byte_characters() -> dict[str, int]:
    """GPT-2's alphabet, character → byte.

    The 188 printable Latin-1 characters stand for their own bytes, and the characters from U+0100 on for the other 68
    bytes, in order (Radford et al. 2019, released code).
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in own}
    return byte_of | {chr(0x100 + n): byte for n, byte in enumerate(b for b in range(256) if b not in set(own))}


def _byte_level_table(ids: dict[str, int], added: dict[int, str]) -> dict[int, bytes]:
    """Bytes of every id of a byte-level tokenizer."""
    byte_of = byte_characters()
    table = {}
    for token, i in ids.items():
        spelled = [byte_of.get(character) for character in token]
        if i in added or None in spelled:
            table[i] = added.get(i, token).encode("utf-8")
        else:
            table[i] = bytes(byte for byte in spelled if byte is not None)
    return table
