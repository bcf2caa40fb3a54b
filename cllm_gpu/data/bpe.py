"""Learns a byte-level BPE from the training part of a corpus; measures any tokenizer on both parts.

Byte-pair encoding as in GPT-2 (Sennrich et al. 2016; Radford et al. 2019): text is split by GPT-2's pattern, a word is
a sequence of bytes, and the pair of neighbours that is met most often becomes the next token until the vocabulary is
full. All 256 bytes are tokens from the start, so every text has an encoding. The library `tokenizers` does the
counting; what it holds grows with the number of different words, not with the text.

Validation text is never learnt from: a tokenizer that had seen it would make validation loss look better than it is.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cllm_gpu.data.prepare import Progress, split_pieces, throttled
from cllm_gpu.data.sources import Corpus
from cllm_gpu.data.split import Part
from cllm_gpu.data.tokenizers import END_OF_TEXT_NAMES, Tokenizer
from cllm_gpu.ops.reference.embedding import MAXIMUM_VOCABULARY
from cllm_gpu.utils.errors import UserError

MINIMUM_VOCABULARY = 257
"""256 bytes and the end of text."""
FEWEST_MEETINGS = 2
"""A pair that is met once is chance, no part of the language."""
SAMPLE_BYTES = 2_000_000
"""Of each part, for bytes per token."""
LONGEST_RUN = 256
"""Characters without a change between white space and others; the library's time is quadratic in a word's length."""
_POLL_SECONDS = 0.1
_LONG_SPACE = re.compile(rf"\s{{{LONGEST_RUN}}}")
_LONG_RUN = re.compile(rf"\S{{{LONGEST_RUN}}}|\s{{{LONGEST_RUN}}}")

Result = TypeVar("Result")


@dataclass
class EvenShare:
    """About `limit` bytes of a stream of about `expected`, spread evenly over it; all where it is no longer."""

    limit: int
    expected: float
    seen: int = 0
    taken: int = 0

    def takes(self, size: int) -> bool:
        """Whether the next piece, of `size` bytes, is among them."""
        due = self.seen * min(1.0, self.limit / max(1.0, self.expected))
        wanted = self.taken <= due and self.taken < self.limit
        self.seen += size
        self.taken += size if wanted else 0
        return wanted


@dataclass
class Sample:
    """Text of one part of a corpus to measure tokenizers on."""

    share: EvenShare
    texts: list[str] = field(default_factory=list)
    ends: int = 0

    def add(self, text: str, text_bytes: int, last: bool) -> None:
        """Take the text where it is its turn; `last`: a document ends with it."""
        if text and self.share.takes(text_bytes):
            self.texts.append(text)
            self.ends += last

    def bytes_per_token(self, tokenizer: Tokenizer) -> float | None:
        """UTF-8 bytes per token, ends of text counted as tokens; None for a part without text."""
        tokens = self.ends + sum(len(ids) for ids in tokenizer.encode_many(self.texts))
        return self.share.taken / tokens if tokens else None


class Reading:
    """One pass over a corpus: training text to learn from, and on the way a sample of each part."""

    def __init__(
        self, corpus: Corpus, *, fraction: float, seed: int, limit: int = 0, progress: Progress | None = None
    ) -> None:
        """`fraction` and `seed` as in `open_dataset`; `limit`: bytes of training text to learn from at most."""
        total = corpus.total_bytes
        expected = {Part.TRAIN: total * (1 - fraction), Part.VALIDATION: total * fraction}
        self.samples = {part: Sample(EvenShare(SAMPLE_BYTES, expected[part])) for part in Part}
        self.learnt = EvenShare(limit, expected[Part.TRAIN])
        self.stopped = False
        self._corpus, self._fraction, self._seed, self._progress = corpus, fraction, seed, progress

    def texts(self) -> Iterator[str]:
        """The training text, in pieces. UserError for bad text, or where a part of the corpus is empty."""
        tell = throttled(self._progress, self._corpus.total_bytes)
        for piece in split_pieces(self._corpus, self._fraction, self._seed):
            if self.stopped:
                return
            self.samples[piece.part].add(piece.text, piece.text_bytes, piece.last)
            if piece.part is Part.TRAIN and piece.text and self.learnt.takes(piece.text_bytes):
                yield from short_runs(piece.text)
            tell(piece.end)
        for part, sample in self.samples.items():
            if not sample.share.seen:
                raise UserError(
                    f"{self._corpus.name} has too little text ({self._corpus.total_bytes} bytes) to hold out "
                    f"{self._fraction:g} for validation: the {part.name.lower()} part is empty"
                )
        tell(self._corpus.total_bytes)


def require_vocabulary(vocabulary: int) -> None:
    """UserError unless a byte-level BPE can have so many tokens."""
    if not MINIMUM_VOCABULARY <= vocabulary <= MAXIMUM_VOCABULARY:
        raise UserError(
            f"vocabulary is {vocabulary}; it must lie between {MINIMUM_VOCABULARY} (256 bytes and the end of text) "
            f"and {MAXIMUM_VOCABULARY}"
        )


def short_runs(text: str) -> Iterator[str]:
    """`text`, cut after every LONGEST_RUN characters of a run: only learning sees it so, encoding does not."""
    if max(map(len, text.split()), default=0) < LONGEST_RUN and not _LONG_SPACE.search(text):
        yield text  # nearly always, and the test costs a third of searching for _LONG_RUN
        return
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    if start < len(text):
        yield text[start:]


def measure(reading: Reading) -> None:
    """Fill the samples of a reading whose limit is 0."""
    for _ in reading.texts():
        pass


def learn_bpe(reading: Reading, vocabulary: int) -> str:
    """A tokenizer.json of at most `vocabulary` ids learnt from the reading's text: the same text, the same file.

    It has fewer ids where no pair is met twice any more. The end of text is "<|endoftext|>", a special token.
    Ctrl-C is obeyed at once. UserError for bad text or an impossible vocabulary.
    """
    require_vocabulary(vocabulary)
    tokenizer = _untrained()
    try:
        _in_thread(lambda: tokenizer.train_from_iterator(reading.texts(), _trainer(vocabulary)))
    except BaseException:
        reading.stopped = True  # after Ctrl-C the thread ends with its next piece
        raise
    json_text: str = tokenizer.to_str(pretty=True)
    return json_text + "\n"


def _untrained() -> Any:
    import tokenizers  # slow to import

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _trainer(vocabulary: int) -> Any:
    from tokenizers import pre_tokenizers, trainers

    alphabet: Iterable[str] = pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=FEWEST_MEETINGS,
        special_tokens=[END_OF_TEXT_NAMES[0]],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )


def _in_thread(work: Callable[[], Result]) -> Result:
    """`work()` in a thread of its own: compiled code hears no Ctrl-C, the thread that waits here does."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
    if errors:
        raise errors[0]
    return results[0]
