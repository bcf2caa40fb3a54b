"""The synthetic data set `patterns`: letter sequences that even a tiny model can learn completely.

A document starts at a letter and steps through the alphabet, up or down, with a fixed stride until it would leave the
alphabet; then comes the end of text: "CFILORUX", "HGFEDCBA", "ABC...Z". It has at least three letters. Within a
document, the two preceding tokens determine every token from the third on, including the end of text: a bigram model
cannot predict it, a model that attends to the previous token can.

Not determined are the first letter of a document, its second (which sets the stride), and the token after the first one
of a window. These targets are IGNORE_INDEX (`TokenSource.ignore_undetermined`), so accuracy and loss are computed over
determined positions only, and can reach 100% and 0. The validation set has other sequences of the same documents.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cllm_gpu.data.random import hash_words, mix
from cllm_gpu.data.tokenizers import LETTERS, Tokenizer
from cllm_gpu.data.tokens import TokenSource, compact_ids
from cllm_gpu.utils.errors import UserError

STRIDES = (1, 2, 3, 4, -1, -2, -3, -4)
SHORTEST = 3
TRAINING_DOCUMENTS = 32768
VALIDATION_DOCUMENTS = 2048


def pattern_documents() -> list[str]:
    """All documents: every start and stride with at least three letters."""
    return [
        document
        for stride in STRIDES
        for start in range(len(LETTERS))
        if len(document := LETTERS[start::stride]) >= SHORTEST
    ]


def pattern_source(name: str, tokenizer: Tokenizer, *, documents: int, seed: int, part: int) -> TokenSource:
    """A stream of `documents` documents drawn by (seed, part), each followed by the end of text.

    Raises UserError if the tokenizer does not encode each letter as one id, as patterns and bytes do.
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
        [compact_ids(stream, tokenizer.vocabulary)],
        vocabulary=tokenizer.vocabulary,
        documents=documents,
        pattern_end=tokenizer.end_of_text,
    )
