"""Loads a tokenizer by name, by path, or from a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cllm_gpu.data.tokenizers.base import Tokenizer
from cllm_gpu.data.tokenizers.byte import ByteTokenizer
from cllm_gpu.data.tokenizers.huggingface import HuggingFaceTokenizer
from cllm_gpu.data.tokenizers.neighbours import with_neighbours
from cllm_gpu.data.tokenizers.patterns import PatternTokenizer
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors


def load_tokenizer(name_or_path: str, end_of_text: str | None = None, *, template: bool = False) -> Tokenizer:
    """The tokenizer "bytes" or "patterns", or that of a Hugging Face tokenizer.json. Raises UserError otherwise.

    end_of_text:  of the tokens of a tokenizer.json the one that ends a text (None: see `with_neighbours`)
    template:     prompts begin with what the file's post-processor puts before a text
    """
    if name_or_path in ("bytes", "patterns"):
        if end_of_text is not None:
            raise UserError(f"--data.end-of-text names a token of a tokenizer.json; {name_or_path} has its own")
        return ByteTokenizer() if name_or_path == "bytes" else PatternTokenizer()
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
    return with_neighbours(text, str(path), path.parent, end_of_text, template=template)


def tokenizer_from_dict(d: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose `as_dict` returned `d`. Raises UserError if `d` is invalid."""
    kind = d.get("kind")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "patterns":
        return PatternTokenizer()
    if kind == "huggingface" and isinstance(d.get("json"), str):
        ends = d.get("ends", [])
        if not isinstance(ends, list) or not all(isinstance(end, str) for end in ends):
            raise UserError("the stored tokenizer's ends of text are no list of tokens")
        name = str(d.get("name") or "stored tokenizer")
        return HuggingFaceTokenizer(d["json"], name, ends, template=d.get("template") is True)
    raise UserError(f"unknown stored tokenizer of kind {kind!r}: this version knows bytes, patterns and huggingface")


def tokenizer_label(name: str, fingerprint: str) -> str:
    """A tokenizer in messages: its name and the start of its fingerprint, which distinguishes files of one name."""
    return f"{name or 'of unknown name'} ({fingerprint[:8]})"


def require_same_tokenizer(stored: dict[str, Any], own: Tokenizer | None) -> None:
    """Raises UserError naming both unless `stored` (from `as_dict`, {} for none) is the same tokenizer as `own`."""
    there = tokenizer_from_dict(stored) if stored else None
    found, here = (tokenizer_label(one.name, one.fingerprint) if one else "none" for one in (there, own))
    if (there and there.fingerprint) != (own and own.fingerprint):
        raise UserError(
            f"the checkpoint was trained with another tokenizer: {found}, here it is {here}; "
            "resume with the tokenizer it had"
        )
