"""How many rows of logits exist at a time; more rows than fit are taken in chunks.

What a chunk costs: let R be its rows, V the vocabulary, C the width. Whatever R is, a row of bfloat16 logits is written
once, replaced by its gradient in place, and read by the two products of the backward: 5 passes, 10·V bytes. A chunk
besides reads the head's weights in two products (4·V·C bytes) and reads and writes their gradient, which is summed in
float32 (8·V·C bytes). The three products are 6·R·V·C operations. So the share of time that chunks add to the head is

    (12·V·C / bytes per second) / (6·R·V·C / operations per second) = 2·(operations per byte) / R,

of which V and C are no part. A card that does 180 bf16 operations in the time of a byte, as an H200 does, loses 54%
with the 667 rows that 64 MB hold of GPT-2's vocabulary, and 4% with 8192 rows, 0.8 GB; 16,384 rows would win 2% more
for as much memory again. Without a gradient only one product reads the weights: an eighth of the rows loses 18%, of a
third of the operations, and the float32 copy that is searched for the likeliest token is as much smaller. (Computed,
not measured: `bench/kernels` measures it on a card. Products that overlap with the traffic lose less.)
On a CPU the logits should stay near the caches, and products gain nothing from more rows than 64 MB hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LogitChunks:
    """The most that is held at a time, in bytes and in rows."""

    bytes: int
    """At least one row is held, whatever its size."""
    rows: int | None = None
    """In training; an eighth of them elsewhere. None: as many as `bytes` hold."""

    def at_once(self, rows: int, vocabulary: int, dtype: Any, *, training: bool) -> int:
        """Rows of a chunk, of `rows` in all; the last chunk may have fewer."""
        held = max(1, self.bytes // (vocabulary * np.dtype(dtype).itemsize))
        if self.rows is not None:
            held = min(held, self.rows if training else max(1, self.rows // 8))
        return min(rows, held)


ON_HOST = LogitChunks(64 << 20)
ON_CARD = LogitChunks(2 << 30, 8192)
