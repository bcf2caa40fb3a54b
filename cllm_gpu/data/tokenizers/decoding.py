"""The bytes of every token of a tokenizer.json, each by itself, so that a stream of tokens is a stream of bytes.

A decoder is a chain of parts. Most look at one token only, and at whether it is the first of the text; ByteLevel and
ByteFallback make bytes of it. For such chains `token_bytes` gives the bytes of a token; the text is the bytes one after
the other. Byte tokens that are no UTF-8 stay bytes, whereas the library writes a whole run of them as U+FFFD.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NEIGHBOUR = "\ue000"
"""A private character that no decoder changes: what stands before a token that is not the first."""
_TEXT_PARTS = ("Replace", "Metaspace", "WordPiece", "Strip")
"""Parts that make text of one token's text."""
_SPACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


@dataclass
class TokenBytes:
    """Bytes of tokens: `spell(id, first)` gives those of one; `strip` is dropped from the front of a text, if there."""

    spell: Callable[[int, bool], bytes]
    strip: tuple[bytes, int] = (b"", 0)
    """What is dropped, and at most how many times."""
    _known: dict[tuple[int, bool], bytes] = field(default_factory=dict)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Bytes of a text of `ids`."""
        known, parts = self._known, []
        for n, token in enumerate(ids):
            key = (token, n == 0)
            if key not in known:
                known[key] = self.spell(*key)
            parts.append(known[key])
        data = b"".join(parts)
        what, most = self.strip
        for _ in range(most):
            data = data.removeprefix(what)
        return data


def byte_characters() -> dict[str, int]:
    """GPT-2's alphabet, character → byte.

    The 188 printable Latin-1 characters stand for their own bytes, and the characters from U+0100 on for the other 68
    bytes, in order (Radford et al. 2019, released code).
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in own}
    return byte_of | {chr(0x100 + n): byte for n, byte in enumerate(b for b in range(256) if b not in set(own))}


def token_bytes(settings: dict[str, Any], tokens: dict[int, str], added: dict[int, str]) -> TokenBytes | None:
    """The bytes of the tokens of a tokenizer.json's content; None if its decoder needs more than one token at a time.

    tokens: id → token, added ones included; added: those alone. An id that no token has is no byte.
    """
    chain = _flat(settings.get("decoder")) or _missing_decoder(settings)
    if any(part.get("type") == "ByteLevel" for part in chain):
        return TokenBytes(_byte_level(tokens, added))
    parts: list[Callable[[str, bool], str]] = []
    fallback = fused = False
    strip = (b"", 0)
    for part in chain:
        kind = part.get("type")
        if kind in ("Fuse", "ByteFallback"):
            fused, fallback = fused or kind == "Fuse", fallback or kind == "ByteFallback"
        elif kind == "Strip" and fused and not part.get("stop"):
            strip = (str(part.get("content", "")).encode(), int(part.get("start", 0)))
        elif kind in _TEXT_PARTS and (not fused or _of_one_character(part)):
            parts.append(_text_part(part))
        else:
            return None
    if not chain:
        parts.append(lambda token, first: token if first else f" {token}")  # as the library joins them
    return TokenBytes(lambda i, first: _spelled(tokens.get(i), first, parts, fallback), strip)


def _flat(decoder: Any) -> list[dict[str, Any]]:
    """The parts of a decoder, sequences opened."""
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") == "Sequence":
        return [part for inner in decoder.get("decoders") or [] for part in _flat(inner)]
    return [decoder]


def _missing_decoder(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The decoder that a file without one means, told by how it makes tokens; [] if nothing tells."""
    if "ByteLevel" in _kinds(settings.get("pre_tokenizer"), "pretokenizers"):
        return [{"type": "ByteLevel"}]
    if settings["model"].get("byte_fallback"):
        return [_SPACE, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return []


def _kinds(part: Any, inner: str) -> set[str]:
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))}.union(*(_kinds(one, inner) for one in part.get(inner) or []))


def _of_one_character(part: dict[str, Any]) -> bool:
    """Whether a part of a fused text sees one character at a time, and so may look at the tokens one by one."""
    pattern = part.get("pattern")
    return part["type"] == "Replace" and isinstance(pattern, dict) and len(str(pattern.get("String", ""))) == 1


def _text_part(part: dict[str, Any]) -> Callable[[str, bool], str]:
    """What a part makes of a token, told whether it is the first: the library's own answer."""
    import tokenizers  # slow to import

    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": part}
    decoder = tokenizers.Tokenizer.from_str(json.dumps(empty)).decoder
    before = len(decoder.decode([_NEIGHBOUR]))

    def text(token: str, first: bool) -> str:
        return str(decoder.decode([token]) if first else decoder.decode([_NEIGHBOUR, token])[before:])

    return text


def _spelled(token: str | None, first: bool, parts: list[Callable[[str, bool], str]], fallback: bool) -> bytes:
    if token is None:
        return b""
    if fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
        return bytes([int(byte[1], 16)])
    for part in parts:
        token = part(token, first)
    return token.encode("utf-8")


def _byte_level(tokens: dict[int, str], added: dict[int, str]) -> Callable[[int, bool], bytes]:
    """Bytes of the tokens of a byte-level tokenizer: of an added one its own, of another those its characters name."""
    byte_of = byte_characters()

    def spell(i: int, first: bool) -> bytes:
        token = tokens.get(i, "")
        spelled = [byte_of.get(character) for character in token]
        if i in added or None in spelled:
            return added.get(i, token).encode("utf-8")
        return bytes(byte for byte in spelled if byte is not None)

    return spell
