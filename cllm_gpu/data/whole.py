"""A text as one stream of tokens in memory, nothing held out: what an evaluation reads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cllm_gpu.data.sources import find_corpus
from cllm_gpu.data.tokens import TokenSource
from cllm_gpu.errors import UserError
from cllm_gpu.tokenizers import Tokenizer


def open_text(source: str, tokenizer: Tokenizer) -> TokenSource:
    """All documents of `source` (file, folder, glob, .jsonl file or "stdlib"), each followed by the end of text.

    The end of text stands before the first document too, so its first token is predicted like every other's.
    UserError, one line, for whatever is wrong with the source.
    """
    corpus = find_corpus(source)
    kind = np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32
    end = np.array([tokenizer.end_of_text], dtype=kind)
    arrays: list[npt.NDArray[np.uint16 | np.uint32]] = [end]
    text_bytes = 0
    for piece in corpus.pieces():
        if piece.text:
            arrays.append(tokenizer.encode(piece.text).astype(kind))
            text_bytes += piece.text_bytes
        if piece.last:
            arrays.append(end)
    if text_bytes == 0:
        raise UserError(f"{corpus.name} holds no text to evaluate")
    stream = np.concatenate(arrays)
    return TokenSource(corpus.name, [stream], vocabulary=tokenizer.vocabulary, text_bytes=text_bytes)
