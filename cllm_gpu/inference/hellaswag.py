"""Multiple choice by likelihood: of several endings of a context, the model's choice is the likeliest.

HellaSwag (Zellers et al. 2019) as it is usually reported: the context is the activity and the two parts of the text,
cleaned of the marks of its source; an ending's score is the sum of its tokens' log-likelihoods after the context (acc),
or that sum by byte of the ending (acc_norm), so that long endings are not at a loss.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_gpu.data.tokenizers import Tokenizer
from cllm_gpu.inference.evaluate import Losses
from cllm_gpu.ops.reference.cross_entropy import IGNORE_INDEX
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors

SHORTEST = 32
"""Tokens to which short batches are padded; longer ones to the next power of two, so that there are few shapes."""


@dataclass(frozen=True)
class Item:
    """A context, its endings and which of them is right (counted from 0)."""

    context: str
    endings: tuple[str, ...]
    label: int
    where: str
    """File and line, for messages."""


@dataclass(frozen=True)
class Choices:
    """What a model chose, over `items`."""

    items: int
    accuracy: float
    """Share of items whose right ending has the greatest sum of log-likelihoods (acc)."""
    accuracy_per_character: float
    """The same by the sum over the ending's characters (acc_norm, as lm-evaluation-harness has it)."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data under the usual names, with standard errors of the mean."""
        return {
            "items": self.items,
            "acc": self.accuracy,
            "acc_stderr": self.standard_error(self.accuracy),
            "acc_norm": self.accuracy_per_character,
            "acc_norm_stderr": self.standard_error(self.accuracy_per_character),
        }

    def standard_error(self, share: float) -> float | None:
        """√(p(1 − p)/(n − 1)); None for a single item."""
        return math.sqrt(share * (1 - share) / (self.items - 1)) if self.items > 1 else None


# ---- reading


def read_hellaswag(path: Path) -> list[Item]:
    """The items of a file in HellaSwag's form: a JSON object in each line, with `endings`, `label` and a context.

    The context is ctx_a and ctx_b (begun with a capital), or `ctx`; activity_label stands before it where there is
    one. Raises UserError that names the line.
    """
    items = []
    try:
        with clear_errors("read", path), path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    items.append(_item(line, f"{path}, line {number}"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}") from None
    if not items:
        raise UserError(f"{path} has no items")
    return items


def _item(line: str, where: str) -> Item:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a JSON object")
    endings = values.get("endings")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(text, str) for text in endings):
        raise UserError(f"{where}: endings must be a list of at least two texts")
    cleaned = tuple(cleaned_text(text) for text in endings)
    for number, text in enumerate(cleaned, 1):
        if not text.strip():
            raise UserError(f"{where}: ending {number} has no text")
    return Item(_context(values, where), cleaned, _label(values.get("label"), len(endings), where), where)


def _label(value: Any, count: int, where: str) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(number) is not int or not 0 <= number < count:
        raise UserError(f"{where}: label is {value!r}; it must be the number of the right ending, 0 to {count - 1}")
    return number


def _context(values: dict[str, Any], where: str) -> str:
    first, second, whole, activity = (values.get(name) for name in ("ctx_a", "ctx_b", "ctx", "activity_label"))
    if isinstance(first, str) and isinstance(second, str):
        whole = f"{first} {second.capitalize()}"
    if not isinstance(whole, str):
        raise UserError(f"{where}: it has neither ctx_a and ctx_b nor ctx")
    return cleaned_text(f"{activity}: {whole}" if isinstance(activity, str) else whole)


def cleaned_text(text: str) -> str:
    """Without the marks in brackets that WikiHow texts have, of which [title] ends a sentence.

    Spaces are left as the usual evaluations leave them, for results that can be compared with theirs.
    """
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


# ---- choosing


@dataclass(frozen=True)
class _Row:
    """An ending after its context: tokens in, targets out (T,), with IGNORE_INDEX where the context is read."""

    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]


def choose(
    items: Sequence[Item],
    tokenizer: Tokenizer,
    losses: Losses,
    to_host: Callable[[Any], npt.NDArray[Any]],
    *,
    context: int,
    batch: int,
    progress: Callable[[int, Choices], None] = lambda done, so_far: None,
) -> Choices:
    """Score every ending with `losses`, `batch` sequences at a time, and count the right choices.

    `context` is the model's: a longer text loses tokens on the left. `progress` is told the items done and the result
    so far. Of equal scores the first counts. UserError for an ending that alone is longer than the context.
    """
    right, right_per_character, done = 0, 0, 0
    scores: list[float] = []
    rows = (row for item in items for row in _rows(item, tokenizer, context))
    for group in _groups(rows, batch):
        scores += _likelihoods(group, losses, to_host, context=context, batch=batch, padding=tokenizer.end_of_text)
        while done < len(items) and len(scores) >= len(items[done].endings):
            item = items[done]
            own, scores = np.array(scores[: len(item.endings)]), scores[len(item.endings) :]
            sizes = np.array([len(ending) for ending in item.endings])
            right += int(np.argmax(own) == item.label)
            right_per_character += int(np.argmax(own / sizes) == item.label)
            done += 1
        if done:
            progress(done, Choices(done, right / done, right_per_character / done))
    return Choices(done, right / done, right_per_character / done)


def _rows(item: Item, tokenizer: Tokenizer, context: int) -> Iterator[_Row]:
    """The rows of an item. An ending's tokens are those that it adds to its context's, spaces between them included."""
    before = tokenizer.encode(item.context.rstrip())
    for ending in item.endings:
        whole = tokenizer.encode(f"{item.context} {ending}" if item.context else ending)
        count = len(whole) - len(before)
        if not len(before):
            whole = np.concatenate([[tokenizer.end_of_text], whole])  # a text is read as the beginning of a document
        if count < 1 or count > context:
            raise UserError(
                f"{item.where}: an ending has {count} tokens beside its context, the model reads {context}: "
                "it cannot be scored"
            )
        window = whole[-(context + 1) :].astype(np.int32)
        targets = window[1:].copy()
        targets[:-count] = IGNORE_INDEX
        yield _Row(window[:-1], targets)


def _groups(rows: Iterator[_Row], size: int) -> Iterator[list[_Row]]:
    group: list[_Row] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _likelihoods(
    group: list[_Row], losses: Losses, to_host: Callable[[Any], Any], *, context: int, batch: int, padding: int
) -> list[float]:
    """Σ of the log-likelihoods (nats, float64) of each row's targets."""
    longest = max(len(row.tokens) for row in group)
    length = min(context, max(SHORTEST, 1 << (longest - 1).bit_length()))
    tokens = np.full((batch, length), padding, np.int32)
    targets = np.full((batch, length), IGNORE_INDEX, np.int32)
    for number, row in enumerate(group):
        tokens[number, : len(row.tokens)] = row.tokens
        targets[number, : len(row.targets)] = row.targets
    values, _ = losses(tokens, targets)
    kept = np.where(targets == IGNORE_INDEX, 0.0, to_host(values).reshape(batch, length).astype(np.float64))
    sums: list[float] = (-kept.sum(axis=1)).tolist()
    return sums[: len(group)]
