"""Tokenizers of the library `tokenizers`, from a Hugging Face tokenizer.json."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_gpu.data.tokenizers.base import checked_ids, utf8
from cllm_gpu.data.tokenizers.decoding import token_bytes
from cllm_gpu.ops.reference.embedding import MAXIMUM_VOCABULARY
from cllm_gpu.utils.errors import UserError

END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<end_of_text>")
"""Names of the end-of-text token: the first of these in a vocabulary is used, if nothing names another."""
_NOT_ENCODING = ("truncation", "padding", "post_processor", "version")
"""Parts of a tokenizer.json that are never applied here: two files that differ only in them are the same tokenizer."""


class HuggingFaceTokenizer:
    """A tokenizer.json of the library `tokenizers`.

    Special tokens that occur in a text are encoded as plain text, no special tokens are added, and the file's
    truncation, padding and dropout of merges are disabled.
    """

    def __init__(
        self,
        json_text: str,
        name: str,
        ends: Sequence[str] = (),
        *,
        notes: Sequence[str] = (),
        template: bool = False,
    ) -> None:
        """json_text: content of a tokenizer.json; name: for messages. Raises UserError if the content is invalid.

        ends:      the tokens that end a text: the first follows every document, each ends generation; without any, the
                   first of END_OF_TEXT_NAMES in the vocabulary does
        notes:     messages about it
        template:  prompts begin with what the file's post-processor puts before a text
        """
        self._json = json_text
        self.name = name.encode("utf-8", "replace").decode("utf-8")  # a path may contain lone surrogates
        self.notes = tuple(notes)
        settings = parse_settings(json_text, name)
        tokens = token_names(settings)
        self._ends = tuple(ends) or (_end_by_name(set(tokens.values()), name),)
        for end in self._ends:
            if end not in tokens.values():
                raise UserError(f"{name} has no token {end!r}, which is to end its texts: name one of its tokens")
        self._default_end = next((end for end in END_OF_TEXT_NAMES if end in tokens.values()), None)
        self._settings = _plain(settings, self._ends)
        self._tokenizer = _build(self._settings, name)
        ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        _require_ids(settings, ids, name)
        self.vocabulary = max(ids.values()) + 1
        self.ends = tuple(ids[end] for end in self._ends)
        self.end_of_text = self.ends[0]
        if self.vocabulary > MAXIMUM_VOCABULARY:
            raise UserError(f"{name} has {self.vocabulary} ids; the largest vocabulary is {MAXIMUM_VOCABULARY}")
        self.unused = tuple(sorted(set(range(self.vocabulary)) - set(ids.values())))
        self.prefix = _prefix(settings.get("post_processor"), ids) if template else ()
        added = {token["id"]: token["content"] for token in settings.get("added_tokens") or []}
        self._bytes = token_bytes(settings, {i: token for token, i in ids.items()}, added)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of what decides how text becomes ids, however the file is written; of its end of text, if not the usual."""
        facts = {key: value for key, value in self._settings.items() if key not in _NOT_ENCODING}
        model = dict(facts["model"])
        merges = model.get("merges") or []
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        facts["model"] = {key: value for key, value in model.items() if value not in (None, False)}
        facts["added_tokens"] = sorted(facts.get("added_tokens") or [], key=lambda token: token["id"])
        facts = {key: value for key, value in facts.items() if value is not None}
        digest = hashlib.sha256(b"cllm_gpu tokenizer: huggingface, version 2\0")
        digest.update(json.dumps(facts, sort_keys=True).encode("utf-8"))
        if self._ends[0] != self._default_end:
            digest.update(b"\0ends with\0" + self._ends[0].encode("utf-8"))
        return digest.hexdigest()

    @functools.cached_property
    def earlier_fingerprints(self) -> tuple[str, ...]:
        """Of the file's very bytes, as shards of version 0.1 have it; these took the end of text by its name."""
        if self._ends[0] != self._default_end:
            return ()
        return (hashlib.sha256(b"cllm_gpu tokenizer: huggingface\0" + self._json.encode("utf-8")).hexdigest(),)

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        for text in texts:
            utf8(text)
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise UserError(self._unknown(texts, error)) from error
        many = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        if any((ids == self.end_of_text).any() for ids in many):
            raise UserError("the tokenizer turns plain text into its end-of-text token; mark that token as special")
        return many

    def _unknown(self, texts: Sequence[str], error: Exception) -> str:
        """One line on the first word that has no encoding."""
        model, split = self._tokenizer.model, self._tokenizer.pre_tokenizer
        for text in texts:
            normal = self._tokenizer.normalizer.normalize_str(text) if self._tokenizer.normalizer else text
            for word in (word for word, _ in split.pre_tokenize_str(normal)) if split else (normal,):
                if not _fails(model, word):
                    continue
                lone = next((character for character in word if _fails(model, character)), None)
                what = f"the character {lone!r} (U+{ord(lone):04X})" if lone else f"the word {word[:40]!r}"
                inside = f" in {word[:40]!r}" if lone and len(word) > 1 else ""
                return f"{self.name} has no token for {what}{inside}, and none for unknown ones: give it an unk_token"
        return f"{self.name} cannot encode the text: {error}"

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of `ids`: of each token exactly, unless the decoder needs the whole text."""
        array = checked_ids(ids, self.vocabulary)
        wanted = array[~np.isin(array, self.ends)].tolist()
        if self._bytes is None:
            return self._tokenizer.decode(wanted, skip_special_tokens=False).encode("utf-8")
        return self._bytes.decode(wanted)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def name_of(self, token: int) -> str:
        """The spelling of a token in the vocabulary."""
        return str(self._tokenizer.id_to_token(token))

    def exported(self) -> str:
        """A tokenizer.json that adds nothing to a text but what `prefix` says, and is the same at every use."""
        settings = copy.deepcopy(self._settings)
        settings |= {"truncation": None, "padding": None}
        if not self.prefix:
            settings["post_processor"] = None
        return self._json if settings == json.loads(self._json) else json.dumps(settings, ensure_ascii=False)

    def as_dict(self) -> dict[str, Any]:
        known: dict[str, Any] = {"kind": "huggingface", "name": self.name, "json": self._json}
        if self._ends != (self._default_end,):
            known["ends"] = list(self._ends)
        return known | ({"template": True} if self.prefix else {})


def parse_settings(json_text: str, name: str) -> dict[str, Any]:
    """A tokenizer.json as a dictionary. Raises UserError if the content is invalid."""
    try:
        settings = json.loads(json_text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON (line {error.lineno}: {error.msg}): give a tokenizer.json") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise UserError(f"{name} has no model: give a tokenizer.json of the library tokenizers")
    return settings


def token_names(settings: dict[str, Any]) -> dict[int, str]:
    """Id → token of a tokenizer.json's content, added tokens included."""
    vocabulary = settings["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram lists [piece, score]
        names = {n: entry[0] for n, entry in enumerate(vocabulary)}
    else:
        names = {i: token for token, i in vocabulary.items()}
    return names | {token.get("id"): token.get("content") for token in settings.get("added_tokens") or []}


def _end_by_name(known: set[str], name: str) -> str:
    for end_name in END_OF_TEXT_NAMES:
        if end_name in known:
            return end_name
    raise UserError(
        f"{name} has no end-of-text token: one of {' '.join(END_OF_TEXT_NAMES)} must be in its vocabulary, "
        "or --data.end-of-text names another of its tokens"
    )


def _plain(settings: dict[str, Any], ends: Sequence[str]) -> dict[str, Any]:
    """The settings with no dropout, and with the ends of text marked special."""
    plain = copy.deepcopy(settings)
    if plain["model"].get("dropout"):
        plain["model"]["dropout"] = None
    for token in plain.get("added_tokens") or []:
        if token.get("content") in ends:
            token["special"] = True
    return plain


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


def _require_ids(settings: dict[str, Any], ids: dict[str, int], name: str) -> None:
    """UserError if the library gives an added token another id than the file does."""
    for token in settings.get("added_tokens") or []:
        if ids.get(token["content"]) != token["id"]:
            raise UserError(
                f"{name} gives its added token {token['content']!r} the id {token['id']}, "
                f"the library tokenizers {ids.get(token['content'])}: added tokens are numbered behind the others, "
                "without gaps"
            )


def _fails(model: Any, word: str) -> bool:
    try:
        model.tokenize(word)
    except Exception:  # the library raises bare Exception
        return True
    return False


def _prefix(processor: Any, ids: dict[str, int]) -> tuple[int, ...]:
    """Ids that a post-processor puts before a text."""
    if not isinstance(processor, dict):
        return ()
    if processor.get("type") == "Sequence":
        return tuple(i for part in processor.get("processors") or [] for i in _prefix(part, ids))
    if isinstance(processor.get("cls"), list):  # BertProcessing, RobertaProcessing
        return (int(processor["cls"][1]),)
    found: list[int] = []
    for piece in processor.get("single") or []:
        if "Sequence" in piece:
            break
        known = (processor.get("special_tokens") or {}).get(piece["SpecialToken"]["id"], {})
        found += known.get("ids") or [ids[piece["SpecialToken"]["id"]]]
    return tuple(found)
