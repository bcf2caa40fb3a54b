"""Text from a trained model, token by token, with a key/value cache.

What the model reads (the window), with or without the cache: first the prompt, or its last `context` tokens when it is
longer; each new token is appended; when the window would exceed the context, its last max(1, context // 2) tokens are
kept and their positions start from 0 again. So the cache is filled anew once per half context, every other step
computes one position, and the output equals that of computing the whole window at every step.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_gpu.data.tokenizers import Tokenizer
from cllm_gpu.inference.sampling import Sampler
from cllm_gpu.model.activations import Activations
from cllm_gpu.model.kv_cache import KeyValueCache
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.utils.errors import UserError

ANCHOR_TOKENS = 8
"""TextStream decodes a new token after this many before it, for tokenizers whose spelling depends on neighbours."""
REPLACEMENT = "\ufffd".encode()


def generate_tokens(
    model: Transformer,
    prompt: npt.NDArray[Any],
    *,
    tokens: int,
    sampler: Sampler,
    stop: int | Collection[int] | None,
    use_cache: bool = True,
    vocabulary: int | None = None,
    unused: Collection[int] = (),
) -> Iterator[int]:
    """At most `tokens` token ids that follow prompt (P,), ending before `stop`, or one of them, when that is picked.

    `vocabulary`: only ids below it are picked (None: all the model has), and none of `unused`. UserError for an empty
    prompt, an id the model does not know or a negative number of tokens; raised at the call, before the first token is
    asked for.
    """
    known = model.architecture.vocabulary
    if tokens < 0:
        raise UserError(f"{tokens} tokens cannot be generated; ask for 0 or more")
    ids = np.asarray(prompt).reshape(-1)
    if ids.size == 0:
        raise UserError("the prompt holds no token; start with the end of text instead")
    outside = ids[(ids < 0) | (ids >= known)]
    if outside.size:
        raise UserError(f"the prompt holds token id {outside[0]}, outside the model's vocabulary of {known}")
    if vocabulary is not None and not 0 < vocabulary <= known:
        raise UserError(f"the tokenizer has {vocabulary} ids, the model {known}: they do not belong together")
    reader = (CachedReader if use_cache else WindowReader)(model, ids.tolist())
    stops = frozenset(() if stop is None else (stop,) if isinstance(stop, int) else stop)
    allowed = np.setdiff1d(np.arange(vocabulary or known), np.array(list(unused), dtype=np.int64))
    return _picked(reader, tokens, sampler, stops, allowed)


def _picked(
    reader: WindowReader | CachedReader,
    tokens: int,
    sampler: Sampler,
    stops: frozenset[int],
    allowed: npt.NDArray[np.int64],
) -> Iterator[int]:
    for _ in range(tokens):
        token = int(allowed[sampler.pick(reader.logits()[allowed])])
        if token in stops:
            return
        yield token
        reader.append(token)


class WindowReader:
    """Logits after the window's last token, computed from the whole window every time."""

    def __init__(self, model: Transformer, prompt: list[int]) -> None:
        self.model = model
        self.context = model.architecture.context
        self.window = prompt[-self.context :]

    def append(self, token: int) -> None:
        """Add a token to the window, which moves on when it is full."""
        self.window.append(token)
        if len(self.window) > self.context:
            self.window = self.window[-max(1, self.context // 2) :]

    def logits(self) -> npt.NDArray[Any]:
        """Logits (V,) on the host."""
        cache = self._empty_cache(len(self.window))
        return self._read(self.window, self._activations_for(len(self.window)), cache)

    def _activations_for(self, length: int) -> Activations:
        dtype = self.model.parameters.layout.dtype
        return Activations(self.model.architecture, self.model.backend, 1, length, dtype, training=False)

    def _empty_cache(self, capacity: int) -> KeyValueCache:
        dtype = self.model.parameters.layout.dtype
        return KeyValueCache(self.model.architecture, self.model.backend, 1, capacity, dtype)

    def _read(self, tokens: list[int], activations: Activations, cache: KeyValueCache) -> npt.NDArray[Any]:
        backend = self.model.backend
        with backend.ranges("generation"):
            ids = backend.asarray(np.array([tokens], dtype=np.int32))  # (1, T)
            return backend.to_host(self.model.next_logits(activations, ids, cache))[0]


class CachedReader(WindowReader):
    """The same logits, computing only the tokens whose keys and values are not in the cache yet."""

    def __init__(self, model: Transformer, prompt: list[int]) -> None:
        super().__init__(model, prompt)
        self._cache = self._empty_cache(self.context)
        self._step = self._activations_for(1)

    def append(self, token: int) -> None:
        """Add a token to the window, which moves on, with an empty cache, when it is full."""
        before = len(self.window)
        super().append(token)
        if len(self.window) <= before:
            self._cache.length = 0

    def logits(self) -> npt.NDArray[Any]:
        """Logits (V,) on the host, once for every token appended."""
        fresh = self.window[self._cache.length :]
        activations = self._step if len(fresh) == 1 else self._activations_for(len(fresh))
        return self._read(fresh, activations, self._cache)


class TextStream:
    """Token ids in, printable text out: a character is given when its last byte has come, never a part of it."""

    def __init__(self, tokenizer: Tokenizer, before: list[int] | None = None) -> None:
        """`before`: tokens that stand in front and are not given out (a prompt); they decide on a leading space."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._given = 0  # bytes of the decoded self._ids already handed to the decoder
        self._anchor(before or [])

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is unfinished."""
        self._ids.append(token)
        data = self._tokenizer.decode_bytes(self._ids)
        # a tokenizer that decodes to text writes an unfinished character as U+FFFD, and corrects it later: wait
        ready = max(self._given, len(self._without_replacements(data)))
        text = self._decoder.decode(data[self._given : ready])
        self._given = ready
        if ready == len(data) and len(self._ids) >= 2 * ANCHOR_TOKENS:
            self._anchor(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end; bytes that never became a character are given as U+FFFD."""
        data = self._tokenizer.decode_bytes(self._ids)
        text = self._decoder.decode(data[self._given :], final=True)
        self._given = len(data)
        return text

    def _anchor(self, ids: list[int]) -> None:
        """Keep the last few of `ids`: as many as it takes that they are more than the blanks a text may lose."""
        length = ANCHOR_TOKENS
        data = self._tokenizer.decode_bytes(ids[-length:])
        while length < len(ids) and not data.strip():
            length *= 2
            data = self._tokenizer.decode_bytes(ids[-length:])
        self._ids, self._given = ids[-length:], len(data)

    @staticmethod
    def _without_replacements(data: bytes) -> bytes:
        while data.endswith(REPLACEMENT):
            data = data[: -len(REPLACEMENT)]
        return data


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    sampler: Sampler,
    use_cache: bool = True,
) -> Iterator[str]:
    """Pieces of the text that follows `prompt`, as they come; it ends at the end of text or after `tokens` tokens.

    An empty prompt starts a new document: the model reads the end of text, which stands before every document. For a
    model from elsewhere that was trained with a template, the template's tokens stand before the prompt instead.
    UserError as in `generate_tokens` and `Tokenizer.encode`, at the call.
    """
    ids = np.concatenate([np.array(tokenizer.prefix, dtype=np.int64), tokenizer.encode(prompt).astype(np.int64)])
    if ids.size == 0:
        ids = np.array([tokenizer.end_of_text])
    picked = generate_tokens(
        model,
        ids,
        tokens=tokens,
        sampler=sampler,
        stop=tokenizer.ends,
        use_cache=use_cache,
        vocabulary=tokenizer.vocabulary,
        unused=tokenizer.unused,
    )
    return _text(picked, TextStream(tokenizer, ids.tolist()))


def _text(picked: Iterator[int], stream: TextStream) -> Iterator[str]:
    for token in picked:
        if text := stream.push(token):
            yield text
    if text := stream.flush():
        yield text
