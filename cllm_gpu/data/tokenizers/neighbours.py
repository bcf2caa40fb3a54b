"""What the files beside a tokenizer.json say of it: further tokens, and which of them end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cllm_gpu.data.tokenizers.huggingface import (
    END_OF_TEXT_NAMES,
    HuggingFaceTokenizer,
    parse_settings,
    token_names,
)
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors

ADDED_TOKENS = "added_tokens.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_CONFIGURATIONS = ("config.json", "generation_config.json")
_PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def with_neighbours(
    json_text: str, name: str, folder: Path, end_of_text: str | None = None, *, template: bool = False
) -> HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json in `folder`, completed by the files beside it.

    The end of text is the token `end_of_text`, else what tokenizer_config.json, config.json and generation_config.json
    name, in this order, else the first of END_OF_TEXT_NAMES; whatever they name ends generation too. A note says which
    was taken if there were several. UserError for files that contradict one another or cannot be read.
    """
    settings = parse_settings(json_text, name)
    missing = _missing_tokens(settings, folder)
    if missing:
        settings["added_tokens"] = [*(settings.get("added_tokens") or []), *missing]
        json_text = json.dumps(settings, ensure_ascii=False)
    names = token_names(settings)
    said = _named_ends(names, folder)
    if end_of_text is not None:
        if end_of_text not in names.values():
            raise UserError(f"--data.end-of-text is {end_of_text!r}, which is no token of {name}: name one of its own")
        said = {end_of_text: "--data.end-of-text", **{end: file for end, file in said.items() if end != end_of_text}}
    by_name = [end for end in END_OF_TEXT_NAMES if end in names.values() and end not in said]
    notes = () if end_of_text is not None else _notes(said, by_name)
    return HuggingFaceTokenizer(json_text, name, tuple(said), notes=notes, template=template)


def _notes(said: dict[str, str], by_name: list[str]) -> tuple[str, ...]:
    """A line on which end of text was taken; none if only one could be."""
    ends = {**said, **dict.fromkeys(by_name, "by its name")}
    if len(ends) < 2:
        return ()
    first, *others = (f"{end} ({where})" for end, where in ends.items())
    return (f"end of text: {first}; not {', '.join(others)}; --data.end-of-text names another",)


def _read(path: Path) -> dict[str, Any]:
    """The content of a JSON file, {} without one or if it is no object."""
    if not path.is_file():
        return {}
    try:
        with clear_errors("read", path):
            content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); it is read because a tokenizer.json lies beside it") from None
    return content if isinstance(content, dict) else {}


def _named_ends(names: dict[int, str], folder: Path) -> dict[str, str]:
    """Tokens that the files say end a text → the file that says so first."""
    ends: dict[str, str] = {}
    token = _read(folder / TOKENIZER_CONFIG).get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if isinstance(content, str) and content in names.values():
        ends[content] = TOKENIZER_CONFIG
    for file in _CONFIGURATIONS:
        ids = _read(folder / file).get("eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            if type(i) is int and i in names:
                ends.setdefault(names[i], file)
    return ends


def _missing_tokens(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The added tokens that only the files beside name, in the order of their ids."""
    listed = {token.get("content") for token in settings.get("added_tokens") or []}
    names = token_names(settings)
    found: dict[int, dict[str, Any]] = {}
    for content, i in _read(folder / ADDED_TOKENS).items():
        if type(i) is int:
            found[i] = {"id": i, "content": content, **_PLAIN_TOKEN}
    decoder = _read(folder / TOKENIZER_CONFIG).get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        if key.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
            known = {name: bool(token.get(name, value)) for name, value in _PLAIN_TOKEN.items()}
            found[int(key)] = {"id": int(key), "content": token["content"], **known}
    missing = [token for _, token in sorted(found.items()) if token["content"] not in listed]
    for token in missing:
        if names.get(token["id"], token["content"]) != token["content"]:
            raise UserError(
                f"{folder}: the token {token['content']!r} is to have the id {token['id']}, which is "
                f"{names[token['id']]!r} in tokenizer.json: they do not belong together"
            )
    return missing
