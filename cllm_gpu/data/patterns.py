"""The synthetic set `patterns`: letter sequences a tiny model must learn completely.

A document starts at a letter and steps through the alphabet, up or down, by a fixed stride until the next letter
would leave it; then comes the end of text: "CFILORUX", "HGFEDCBA", "ABC...Z". It has three letters at least. So the
two tokens before it, in one document, determine every later token, its end included; a bigram model cannot know it, a
model that attends to the previous token can.

Not determined: a document's first letter, its second (which sets the stride), and whatever follows the first token of a
window. Those targets are IGNORE_INDEX (`TokenSource.hide_undetermined`), so accuracy and loss are over determined
positions alone, and can reach 100% and 0. Validation holds other sequences of the same documents.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cllm_gpu.data.random import hash_words, mix
from cllm_gpu.data.tokenizers import LETTERS, Tokenizer
from cllm_gpu.data.tokens import TokenSource, narrow
from cllm_gpu.utils.errors import UserError

STRIDES = (1, 2, 3, 4, -1, -2, -3, -4)
SHORTEST = 3
TRAINING_DOCUMENTS = 32768
VALIDATION_DOCUMENTS = 2048


def pattern_documents() -> list[str]:
    """All documents: every start and stride that give at least three letters."""
    return [
        document
        for stride in STRIDES
        for start in range(len(LETTERS))
        if len(document := LETTERS[start::stride]) >= SHORTEST
    ]


def pattern_source(name: str, tokenizer: Tokenizer, *, documents: int, seed: int, part: int) -> TokenSource:
    """A stream of `documents` documents drawn by (seed, part), each followed by the end of text.

    Works with any tokenizer that gives each letter one id (patterns, bytes); UserError otherwise.
    """
    ids = {letter: tokenizer.encode(letter) for letter in LETTERS}
    if any(len(encoded) != 1 for encoded in ids.values()):
        raise UserError("patterns needs a tokenizer with one id per letter: choose the tokenizer patterns or bytes")
    encoded = [
        np.array([*(int(ids[letter][0]) for letter in document), tokenizer.end_of_text], dtype=np.uint32)
        for document in pattern_documents()
    ]
    counter = np.arange(documents, dtype=np.uint64) + np.uint64(hash_words(seed, part))
    drawn: npt.NDArray[np.uint64] = mix(counter) % np.uint64(len(encoded))
    stream = np.concatenate([encoded[index] for index in drawn.tolist()])
    return TokenSource(
        name,
        [narrow(stream, tokenizer.vocabulary)],
        vocabulary=tokenizer.vocabulary,
        documents=documents,
        pattern_end=tokenizer.end_of_text,
    )
