"""Whether text comes back from its tokens as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cllm_gpu.data.tokenizers.base import Tokenizer


def lost_share(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Share of the characters of `texts` that are not in what their tokens decode to; 0 if all come back as they were.

    At least: characters are counted, not their places. Text that comes back changed, though with all its characters,
    counts by what was added to it.
    """
    lost = total = 0
    for text in texts:
        back = tokenizer.decode(tokenizer.encode(text).tolist())
        total += len(text)
        if back != text:
            before, after = Counter(text), Counter(back)
            lost += (before - after).total() or (after - before).total() or 1
    return min(1.0, lost / total) if total else 0.0
