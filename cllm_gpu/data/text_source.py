"""A text as one token stream in memory, without a split: the input of an evaluation."""

from __future__ import annotations

import numpy as np

from cllm_gpu.data.dataset import text_corpus
from cllm_gpu.data.text import TextOptions
from cllm_gpu.data.tokenizers import Tokenizer, lost_share
from cllm_gpu.data.tokens import Tokens, TokenSource, compact_ids
from cllm_gpu.utils.errors import UserError


def open_text(source: str, tokenizer: Tokenizer, options: TextOptions | None = None) -> TokenSource:
    """All documents of `source` (file, folder, glob, .jsonl file or "stdlib"), each followed by the end of text.

    An end of text also precedes the first document, so that its first token is predicted like that of any other.
    Raises UserError for anything wrong with the source.
    """
    corpus = text_corpus(source, options)
    end = compact_ids(np.array([tokenizer.end_of_text], dtype=np.uint32), tokenizer.vocabulary)
    arrays: list[Tokens] = [end]
    text_bytes = 0
    for piece in corpus.pieces():
        if piece.text:
            arrays.append(compact_ids(tokenizer.encode(piece.text), tokenizer.vocabulary))
            text_bytes += piece.text_bytes
        if piece.last:
            arrays.append(end)
    if text_bytes == 0:
        raise UserError(f"{corpus.name} holds no text to evaluate")
    lost = lost_share(tokenizer, corpus.sample())
    return TokenSource(corpus.name, arrays, vocabulary=tokenizer.vocabulary, text_bytes=text_bytes, lost=lost)
