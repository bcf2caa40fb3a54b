"""A token stream to take windows from, over one or several arrays, in memory or in files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cllm_gpu.data.token_file import DataError, TokenFile
from cllm_gpu.ops.reference.cross_entropy import IGNORE_INDEX

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32] | TokenFile
Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


def compact_ids(ids: npt.NDArray[np.uint32], vocabulary: int) -> Tokens:
    """`ids` as uint16 if `vocabulary` is at most 65,536, else unchanged."""
    return ids.astype(np.uint16) if vocabulary <= 1 << 16 else ids


class TokenSource:
    """A read-only stream of token ids: the part [start, stop) of the concatenation of `arrays`.

    name:             for messages
    vocabulary:       vocabulary size; every id is below it, which each read checks
    text_bytes:       UTF-8 bytes of the underlying text; None if unknown
    documents:        number of documents; None if unknown
    digest:           checksum of the tokens; empty if the source has none
    lost:             fraction of the text's characters that the tokens do not reproduce; None if unknown
    pattern_end:      end-of-text id of the data set `patterns`, whose undetermined targets are IGNORE_INDEX (see
                      cllm_gpu/data/patterns.py); None for text
    """

    def __init__(
        self,
        name: str,
        arrays: Sequence[Tokens],
        *,
        vocabulary: int,
        start: int = 0,
        stop: int | None = None,
        text_bytes: int | None = None,
        documents: int | None = None,
        pattern_end: int | None = None,
        digest: str = "",
        lost: float | None = None,
    ) -> None:
        self.name, self.vocabulary, self.digest = name, vocabulary, digest
        self.lost = lost
        self.text_bytes, self.documents, self.pattern_end = text_bytes, documents, pattern_end
        self._arrays = [array if isinstance(array, TokenFile) else np.asarray(array) for array in arrays]
        self._ends = np.cumsum([len(array) for array in self._arrays], dtype=np.int64)
        whole = int(self._ends[-1]) if self._arrays else 0
        self._start, self._stop = start, whole if stop is None else stop
        if not 0 <= self._start <= self._stop <= whole:
            raise ValueError(f"part [{start}, {stop}) of a stream of {whole} tokens")

    def __len__(self) -> int:
        return self._stop - self._start

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token, counting end-of-text tokens; None if unknown."""
        return self.text_bytes / len(self) if self.text_bytes and len(self) else None

    def read(self, start: int, count: int) -> npt.NDArray[np.int32]:
        """Tokens [start, start + count), int32; wraps around at the end (count <= len(self)).

        Raises DataError for a file that changed since it was opened, and for an id outside the vocabulary.
        """
        if not (0 <= start < len(self) and 0 <= count <= len(self)):
            raise ValueError(f"window of {count} tokens at {start} in a stream of {len(self)}")
        out = np.empty(count, dtype=np.int32)
        before_end = min(count, len(self) - start)
        self._fill(out[:before_end], self._start + start)
        self._fill(out[before_end:], self._start)
        self._require_vocabulary(out, start)
        return out

    def _require_vocabulary(self, tokens: npt.NDArray[np.int32], start: int) -> None:
        ids = tokens.view(np.uint32)
        outside = np.flatnonzero(ids >= self.vocabulary)
        if len(outside):
            raise DataError(
                f"{self.name} holds token id {ids[outside[0]]} (token {(start + int(outside[0])) % len(self)}), "
                f"outside the vocabulary of {self.vocabulary}: give the tokenizer it was made with"
            )

    def _fill(self, out: npt.NDArray[np.int32], position: int) -> None:
        """Copy the tokens at `position` of the concatenated arrays into `out`, across array boundaries."""
        index = int(np.searchsorted(self._ends, position, side="right"))
        while len(out):
            array = self._arrays[index]
            offset = position - (int(self._ends[index]) - len(array))
            taken = min(len(out), len(array) - offset)
            # the cast keeps the bits of a uint32 id: valid ids are below 2^20, _require_vocabulary catches others
            out[:taken] = array[offset : offset + taken].astype(np.int32, copy=False)
            out, position, index = out[taken:], position + taken, index + 1

    def windows(self, starts: Sequence[int], context: int) -> Batch:
        """Tokens and next-token targets, (len(starts), context) int32 each, of the windows that begin at `starts`."""
        both = np.empty((len(starts), context + 1), dtype=np.int32)
        for row, start in zip(both, starts, strict=True):
            row[:] = self.read(start, context + 1)
        tokens, targets = both[:, :-1].copy(), both[:, 1:].copy()
        self.ignore_undetermined(tokens, targets)
        return tokens, targets

    def ignore_undetermined(self, tokens: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]) -> None:
        """In `patterns`, set a target to IGNORE_INDEX if the two preceding tokens are not of the same document."""
        if self.pattern_end is None:
            return
        is_end = tokens == self.pattern_end
        targets[is_end] = IGNORE_INDEX
        targets[:, 0] = IGNORE_INDEX
        targets[:, 1:][is_end[:, :-1]] = IGNORE_INDEX
