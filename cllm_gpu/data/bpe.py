"""Trains a byte-level BPE tokenizer on the training part of a corpus; measures any tokenizer on both parts.

Byte-pair encoding as in GPT-2 (Sennrich et al. 2016; Radford et al. 2019): text is split into words by GPT-2's pattern,
a word is a sequence of bytes, and the most frequent pair of adjacent tokens is merged into a new token until the
vocabulary is full. All 256 bytes are tokens from the start, so every text can be encoded. The library `tokenizers` does
the training; its memory grows with the number of distinct words, not with the text.

The tokenizer is never trained on validation text, which would make the validation loss look better than it is.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cllm_gpu.data.prepare import Progress, split_pieces, throttled_progress
from cllm_gpu.data.sources import Corpus
from cllm_gpu.data.split import Part
from cllm_gpu.data.tokenizers import END_OF_TEXT_NAMES, Tokenizer
from cllm_gpu.ops.reference.embedding import MAXIMUM_VOCABULARY
from cllm_gpu.utils.errors import UserError

MINIMUM_VOCABULARY = 257
"""256 bytes and the end of text."""
MINIMUM_PAIR_FREQUENCY = 2
"""Pairs that occur only once are not merged."""
SAMPLE_BYTES = 2_000_000
"""Bytes of each part on which bytes per token are measured."""
LONGEST_RUN = 256
"""Maximum length of a run of white space or of other characters; the library's time is quadratic in word length."""
_POLL_SECONDS = 0.1
_LONG_SPACE = re.compile(rf"\s{{{LONGEST_RUN}}}")
_LONG_RUN = re.compile(rf"\S{{{LONGEST_RUN}}}|\s{{{LONGEST_RUN}}}")

Result = TypeVar("Result")


@dataclass
class EvenSubsample:
    """Selects about `limit` bytes of a stream of about `expected` bytes, spread evenly; all of a shorter stream."""

    limit: int
    expected: float
    seen: int = 0
    taken: int = 0

    def takes(self, size: int) -> bool:
        """Whether the next piece, of `size` bytes, is selected."""
        due = self.seen * min(1.0, self.limit / max(1.0, self.expected))
        wanted = self.taken <= due and self.taken < self.limit
        self.seen += size
        self.taken += size if wanted else 0
        return wanted


@dataclass
class Sample:
    """A text sample of one part of a corpus, for measuring tokenizers."""

    share: EvenSubsample
    texts: list[str] = field(default_factory=list)
    ends: int = 0

    def add(self, text: str, text_bytes: int, last: bool) -> None:
        """Add the text if it is selected. last: the text ends a document."""
        if text and self.share.takes(text_bytes):
            self.texts.append(text)
            self.ends += last

    def bytes_per_token(self, tokenizer: Tokenizer) -> float | None:
        """UTF-8 bytes per token, counting end-of-text tokens; None if the sample is empty."""
        tokens = self.ends + sum(len(ids) for ids in tokenizer.encode_many(self.texts))
        return self.share.taken / tokens if tokens else None


class Reading:
    """One pass over a corpus that yields training text and collects a sample of each part."""

    def __init__(
        self, corpus: Corpus, *, fraction: float, seed: int, limit: int = 0, progress: Progress | None = None
    ) -> None:
        """fraction, seed: as in `open_dataset`; limit: maximum bytes of training text to yield."""
        total = corpus.total_bytes
        expected = {Part.TRAIN: total * (1 - fraction), Part.VALIDATION: total * fraction}
        self.samples = {part: Sample(EvenSubsample(SAMPLE_BYTES, expected[part])) for part in Part}
        self.training_share = EvenSubsample(limit, expected[Part.TRAIN])
        self.stopped = False
        self._corpus, self._fraction, self._seed, self._progress = corpus, fraction, seed, progress

    def texts(self) -> Iterator[str]:
        """The training text, in pieces. Raises UserError for invalid text, or if a part of the corpus is empty."""
        tell = throttled_progress(self._progress, self._corpus.total_bytes)
        for piece in split_pieces(self._corpus, self._fraction, self._seed):
            if self.stopped:
                return
            self.samples[piece.part].add(piece.text, piece.text_bytes, piece.last)
            if piece.part is Part.TRAIN and piece.text and self.training_share.takes(piece.text_bytes):
                yield from split_long_runs(piece.text)
            tell(piece.end)
        for part, sample in self.samples.items():
            if not sample.share.seen:
                raise UserError(
                    f"{self._corpus.name} has too little text ({self._corpus.total_bytes} bytes) to hold out "
                    f"{self._fraction:g} for validation: the {part.name.lower()} part is empty"
                )
        tell(self._corpus.total_bytes)


def require_vocabulary(vocabulary: int) -> None:
    """Raises UserError unless `vocabulary` is a valid size of a byte-level BPE."""
    if not MINIMUM_VOCABULARY <= vocabulary <= MAXIMUM_VOCABULARY:
        raise UserError(
            f"vocabulary is {vocabulary}; it must lie between {MINIMUM_VOCABULARY} (256 bytes and the end of text) "
            f"and {MAXIMUM_VOCABULARY}"
        )


def split_long_runs(text: str) -> Iterator[str]:
    """`text`, cut after every LONGEST_RUN characters of a run. Applies to training only, not to encoding."""
    if max(map(len, text.split()), default=0) < LONGEST_RUN and not _LONG_SPACE.search(text):
        yield text  # the usual case, whose test costs a third of a search for _LONG_RUN
        return
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    if start < len(text):
        yield text[start:]


def measure(reading: Reading) -> None:
    """Fill the samples of `reading` without using its text (limit 0)."""
    for _ in reading.texts():
        pass


def learn_bpe(reading: Reading, vocabulary: int) -> str:
    """Train on the text of `reading`; returns a tokenizer.json with at most `vocabulary` ids. Deterministic.

    There are fewer ids if no pair occurs twice any more. The end of text is the special token "<|endoftext|>". Ctrl-C
    is handled immediately. Raises UserError for invalid text or vocabulary size.
    """
    require_vocabulary(vocabulary)
    tokenizer = _untrained()
    try:
        _in_thread(lambda: tokenizer.train_from_iterator(reading.texts(), _trainer(vocabulary)))
    except BaseException:
        reading.stopped = True  # the thread ends at its next piece
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
        min_frequency=MINIMUM_PAIR_FREQUENCY,
        special_tokens=[END_OF_TEXT_NAMES[0]],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )


def _in_thread(work: Callable[[], Result]) -> Result:
    """Run `work()` in another thread: compiled code does not handle Ctrl-C, but the thread that waits here does."""
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
