"""Text to token ids and back: bytes (the default), the letters of `patterns`, and Hugging Face's tokenizer.json.

Every tokenizer has one id that no text can produce, the end of text: it follows each document and ends generation.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cllm_gpu.ops.reference.embedding import MAXIMUM_VOCABULARY
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<end_of_text>")


class Tokenizer(Protocol):
    """What training, generation and checkpoints ask of a tokenizer."""

    @property
    def name(self) -> str:
        """What the user called it: "bytes", "patterns", or the path of its file."""

    @property
    def vocabulary(self) -> int:
        """Number of ids, end of text included."""

    @property
    def end_of_text(self) -> int:
        """The id that follows every document."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 that two tokenizers share only when they map text alike."""

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Ids of `text`, one dimension; never holds `end_of_text`. UserError for text that cannot be encoded."""

    def encode_many(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """`encode` of each text, on several processors where that pays."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ends of text become nothing."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of `ids`, for streaming: a token may end inside a character."""

    def as_dict(self) -> dict[str, Any]:
        """All that `tokenizer_from_dict` needs, as JSON values."""


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer called "bytes" or "patterns", or that of a Hugging Face tokenizer.json; UserError otherwise."""
    if name_or_path == "bytes":
        return ByteTokenizer()
    if name_or_path == "patterns":
        return PatternTokenizer()
    path = Path(os.path.expanduser(name_or_path))
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.exists():
        raise UserError(
            f"no tokenizer {name_or_path!r}: say bytes, patterns, or the path of a Hugging Face tokenizer.json"
        )
    try:
        with clear_errors("read", path):
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the tokenizer {path} is not UTF-8 text (byte {error.start})") from error
    return HuggingFaceTokenizer(text, str(path))


def tokenizer_from_dict(d: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose `as_dict` gave `d`; UserError where `d` describes none."""
    kind = d.get("kind")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "patterns":
        return PatternTokenizer()
    if kind == "huggingface" and isinstance(d.get("json"), str):
        return HuggingFaceTokenizer(d["json"], str(d.get("name") or "stored tokenizer"))
    raise UserError(f"unknown stored tokenizer of kind {kind!r}: this version knows bytes, patterns and huggingface")


def identified(name: str, fingerprint: str) -> str:
    """A tokenizer in messages: its name and the beginning of its fingerprint, which tells files of one name apart."""
    return f"{name or 'of unknown name'} ({fingerprint[:8]})"


def require_same(stored: dict[str, Any], own: Tokenizer | None) -> None:
    """UserError naming both unless `stored` (what `as_dict` gave, {} for none) maps text as `own` does."""
    there = tokenizer_from_dict(stored) if stored else None
    found, here = (identified(one.name, one.fingerprint) if one else "none" for one in (there, own))
    if (there and there.fingerprint) != (own and own.fingerprint):
        raise UserError(
            f"the checkpoint was trained with another tokenizer: {found}, here it is {here}; "
            "resume with the tokenizer it had"
        )


def utf8(text: str) -> bytes:
    """UTF-8 bytes of `text`; UserError for a lone surrogate, which stands for no character."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(
            f"text holds the lone surrogate U+{code:04X} at character {error.start}, which UTF-8 cannot write"
        ) from error


def checked_ids(ids: Iterable[int], vocabulary: int) -> npt.NDArray[np.int64]:
    """`ids` as int64, one dimension; UserError for an id outside [0, vocabulary)."""
    array = np.fromiter(ids, dtype=np.int64)
    outside = (array < 0) | (array >= vocabulary)
    if outside.any():
        raise UserError(f"token id {array[outside][0]} is outside the tokenizer's vocabulary of {vocabulary}")
    return array


class ByteTokenizer:
    """One id per UTF-8 byte (0 to 255) and 256 for the end of text: lossless for any text."""

    name = "bytes"
    vocabulary = 257
    end_of_text = 256
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


class PatternTokenizer:
    """The letters A to Z (0 to 25) and 26 for the end of text; white space is dropped, anything else refused."""

    name = "patterns"
    vocabulary = len(LETTERS) + 1
    end_of_text = len(LETTERS)
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


class HuggingFaceTokenizer:
    """A tokenizer.json of the library `tokenizers`.

    The end of text is the first of END_OF_TEXT_NAMES in its vocabulary. Special tokens written out in a text are
    encoded as plain text, no special token is added, truncation and padding in the file are switched off.
    """

    def __init__(self, json_text: str, name: str) -> None:
        """`json_text`: content of a tokenizer.json; `name` is for messages. UserError where it is none."""
        self._json = json_text
        self.name = name.encode("utf-8", "replace").decode("utf-8")  # a path may hold what UTF-8 cannot write
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
        """UTF-8 bytes of `ids`. Exact piece by piece for byte-level tokenizers; others decode the piece as a text."""
        array = checked_ids(ids, self.vocabulary)
        wanted = array[array != self.end_of_text].tolist()
        if self._bytes is None:
            return self._tokenizer.decode(wanted, skip_special_tokens=False).encode("utf-8")
        return b"".join(self._bytes.get(i, b"") for i in wanted)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def name_of(self, token: int) -> str:
        """How a token is spelled in the vocabulary."""
        return str(self._tokenizer.id_to_token(token))

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "huggingface", "name": self.name, "json": self._json}


def _parse_settings(json_text: str, name: str) -> tuple[dict[str, Any], str]:
    """The file as a dictionary whose end-of-text token is marked special, and that token's name."""
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
    """The library's tokenizer for `settings`; a broken file is a UserError (the library raises bare Exception)."""
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
