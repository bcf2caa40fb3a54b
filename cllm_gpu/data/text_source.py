"""A text as one stream of tokens in memory, nothing held out: what an evaluation reads."""

from __future__ import annotations

import numpy as np

from cllm_gpu.data.dataset import text_corpus
from cllm_gpu.data.text import TextOptions
from cllm_gpu.data.tokenizers import Tokenizer, lost_share
from cllm_gpu.data.tokens import Tokens, TokenSource, narrow
from cllm_gpu.utils.errors import UserError


def open_text(source: str, tokenizer: Tokenizer, options: TextOptions | None = None) -> TokenSource:
    """All documents of `source` (file, folder, glob, .jsonl file or "stdlib"), each followed by the end of text.

    The end of text stands before the first document too, so its first token is predicted like every other's.
    UserError, one line, for whatever is wrong with the source.
    """
    corpus = text_corpus(source, options)
    end = narrow(np.array([tokenizer.end_of_text], dtype=np.uint32), tokenizer.vocabulary)
    arrays: list[Tokens] = [end]
    text_bytes = 0
    for piece in corpus.pieces():
        if piece.text:
            arrays.append(narrow(tokenizer.encode(piece.text), tokenizer.vocabulary))
            text_bytes += piece.text_bytes
        if piece.last:
            arrays.append(end)
    if text_bytes == 0:
        raise UserError(f"{corpus.name} holds no text to evaluate")
    lost = lost_share(tokenizer, corpus.sample())
    return TokenSource(corpus.name, arrays, vocabulary=tokenizer.vocabulary, text_bytes=text_bytes, lost=lost)
