"""Tokenizers in a Hugging Face folder: tokenizer.json, or GPT-2's older vocab.json and merges.txt.

A byte-level BPE without merges is our tokenizer `bytes`: each of the 256 characters of GPT-2's alphabet is one id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cllm_gpu.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    byte_characters,
    load_tokenizer,
    with_neighbours,
)
from cllm_gpu.utils.errors import UserError

TOKENIZER = "tokenizer.json"
VOCABULARY = "vocab.json"
MERGES = "merges.txt"
END_OF_TEXT = "<|endoftext|>"


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None if it has none. Raises UserError for invalid files.

    Prompts begin with what its post-processor puts before a text, as they did when the model was trained.
    """
    if (folder / TOKENIZER).is_file():
        found = load_tokenizer(str(folder / TOKENIZER), template=True)
        own = HuggingFaceTokenizer(json.dumps(bytes_settings()), TOKENIZER)
        return ByteTokenizer() if found.fingerprint == own.fingerprint and not found.prefix else found
    files = [folder / name for name in (VOCABULARY, MERGES)]
    there = [path for path in files if path.is_file()]
    if len(there) == 1:
        raise UserError(f"{there[0]} has no {next(f.name for f in files if f not in there)} beside it: give both")
    return _from_merges(*files) if there else None


def _from_merges(vocabulary: Path, merges: Path) -> Tokenizer:
    """GPT-2's tokenizer from its two files, with its end of text marked as special."""
    import tokenizers  # slow to import
    from tokenizers import decoders, models, pre_tokenizers

    try:
        built = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{vocabulary} and {merges.name} are not a byte-level BPE: {error}") from error
    if built.token_to_id(END_OF_TEXT) is None:
        raise UserError(f"{vocabulary} has no {END_OF_TEXT}: it is not the vocabulary of a GPT-2")
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([END_OF_TEXT])
    return with_neighbours(built.to_str(), str(vocabulary), vocabulary.parent)


def tokenizer_text(tokenizer: Tokenizer) -> str | None:
    """The content of a tokenizer.json equivalent to `tokenizer`; None if it cannot be expressed as one."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.exported()
    return json.dumps(bytes_settings()) if isinstance(tokenizer, ByteTokenizer) else None


def tokenizer_config(tokenizer: Tokenizer, text: str, context: int) -> dict[str, Any]:
    """The content of tokenizer_config.json, which transformers' AutoTokenizer needs."""
    named = tokenizer if isinstance(tokenizer, HuggingFaceTokenizer) else HuggingFaceTokenizer(text, TOKENIZER)
    end = named.name_of(tokenizer.end_of_text)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }


def bytes_settings() -> dict[str, Any]:
    """`ByteTokenizer` as the content of a tokenizer.json, with the same ids."""
    end = {
        "id": ByteTokenizer.end_of_text, "content": END_OF_TEXT, "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False, "special": True,
    }  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": byte_characters() | {END_OF_TEXT: end["id"]},
            "merges": [],
        },
    }  # fmt: skip
