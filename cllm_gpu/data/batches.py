"""Batches for training and evaluation: pure functions of their arguments, so a resumed run gets the same ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cllm_gpu.data.random import hash_words, permute
from cllm_gpu.data.tokens import IGNORE_INDEX, Batch, TokenSource
from cllm_gpu.utils.errors import UserError


def require_length(source: TokenSource, context: int) -> None:
    """Raises UserError if `source` cannot fill one window of `context` tokens and their targets."""
    if len(source) < context + 1:
        raise UserError(
            f"{source.name} has {len(source)} tokens, too few for a context of {context}: "
            f"give at least {context + 1} tokens of text or a shorter context"
        )


class Batches:
    """Training batches, a pure function of (seed, step, rank): no state to save, O(1) memory for any corpus.

    An epoch tiles the stream with W = len(source) // context windows that do not overlap. Their offset (the stream
    wraps around) and their order are drawn for each epoch. Sample n = origin + (step * ranks + rank) * batch + row is
    window n mod W of epoch n div W: together and in order, `ranks` ranks with `batch` rows get the same samples as one
    rank with ranks * batch rows. The same holds for the micro-batches of a step. `origin` is 0 unless the batch size
    changed on resuming: see `continue_at`.
    """

    def __init__(
        self, source: TokenSource, *, batch: int, context: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        """Windows of `context` tokens, `batch` per step and rank. Raises UserError if `source` is too short."""
        if batch < 1 or context < 1:
            raise UserError(f"batch ({batch}) and context ({context}) must be at least 1")
        if not 0 <= rank < ranks:
            raise UserError(f"rank {rank} is outside [0, {ranks})")
        require_length(source, context)
        self.source, self.batch_size, self.context, self.seed = source, batch, context, seed
        self.rank, self.ranks = rank, ranks
        self.windows_per_epoch = len(source) // context
        self.origin = 0

    def continue_at(self, step: int, samples: int) -> None:
        """Let step number `step` begin at sample number `samples`, as many as all ranks saw before it."""
        self.origin = samples - step * self.ranks * self.batch_size

    def samples(self, step: int) -> npt.NDArray[np.int64]:
        """Sample numbers of a step, (batch,) int64, counted from the start of training over all ranks."""
        first = self.origin + (step * self.ranks + self.rank) * self.batch_size
        return np.arange(first, first + self.batch_size, dtype=np.int64)

    def starts(self, step: int) -> npt.NDArray[np.int64]:
        """Start positions in the stream of the windows of a step, (batch,) int64."""
        samples = self.samples(step)
        epochs = samples // self.windows_per_epoch
        starts = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            positions = (samples[chosen] - epoch * self.windows_per_epoch).astype(np.uint64)
            window = permute(positions, self.windows_per_epoch, hash_words(self.seed, epoch, 0)).astype(np.int64)
            offset = hash_words(self.seed, epoch, 1) % len(self.source)
            starts[chosen] = (window * self.context + offset) % len(self.source)
        return starts

    def batch(self, step: int) -> Batch:
        """Tokens and targets of a step, (batch, context) int32 each; targets are the next tokens or IGNORE_INDEX."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        return self.source.windows(self.starts(step).tolist(), self.context)


def evaluation_batches(source: TokenSource, *, batch: int, context: int, limit: int | None) -> Iterator[Batch]:
    """Fixed batches over `source`, (batch, context) int32 each; every token except the first is a target once.

    Windows are consecutive. The last one, and missing rows of the last batch, are padded with token 0 and targets
    IGNORE_INDEX, so all batches have the same shape. limit: maximum number of batches (None: all); with fewer than all,
    the windows are spread evenly over the stream.
    """
    count = evaluation_windows(source, batch=batch, context=context, limit=limit)
    whole = _whole_windows(source, context)
    for first in range(0, count, batch):
        chosen = [n * whole // count for n in range(first, min(first + batch, count))]
        yield _evaluation_batch(source, chosen, batch, context)


def evaluation_windows(source: TokenSource, *, batch: int, context: int, limit: int | None) -> int:
    """Number of windows in `evaluation_batches`. Raises UserError if there can be none."""
    if batch < 1 or context < 1 or (limit is not None and limit < 1):
        raise UserError(f"evaluation batch ({batch}), context ({context}) and limit ({limit}) must be at least 1")
    if len(source) < 2:
        raise UserError(f"{source.name} has {len(source)} tokens; evaluation needs at least 2")
    whole = _whole_windows(source, context)
    return whole if limit is None else min(whole, limit * batch)


def _whole_windows(source: TokenSource, context: int) -> int:
    return -(-(len(source) - 1) // context)


def _evaluation_batch(source: TokenSource, windows: list[int], batch: int, context: int) -> Batch:
    tokens = np.zeros((batch, context), dtype=np.int32)
    targets = np.full((batch, context), IGNORE_INDEX, dtype=np.int32)
    for row, window in enumerate(windows):
        start = window * context
        length = min(context, len(source) - 1 - start)
        both = source.read(start, length + 1)
        tokens[row, :length], targets[row, :length] = both[:-1], both[1:]
        source.ignore_undetermined(tokens[row : row + 1, :length], targets[row : row + 1, :length])
    return tokens, targets
