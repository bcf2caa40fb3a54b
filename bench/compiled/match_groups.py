"""Counts on real token sequences how often the attention kernels compare longer matches.

A warp processes groups of 16×8 pairs and tries increasing orders of matches on all 128 while at least one of them still
matches (`for_matches` in cuda/score_terms.cuh).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_gpu.ops.reference.score_bias import MAXIMUM_MATCHES, match_lengths


def longest_in_groups(tokens: npt.NDArray[Any], queries: int, keys: int) -> npt.NDArray[np.uint8]:
    """The longest match, at most 8, in every group of `queries` by `keys` adjacent pairs of tokens (T,).

    T must be a multiple of both. Only the groups (T/queries, T/keys) with a visible pair are returned; masked pairs of
    such a group count too, since the kernels compare them before the mask.
    """
    positions = slice(0, len(tokens))
    lengths = match_lengths(np, tokens, positions, positions, MAXIMUM_MATCHES)
    rows, columns = len(tokens) // queries, len(tokens) // keys
    groups = lengths.reshape(rows, queries, columns, keys).max(axis=(1, 3))
    seen = (np.arange(rows)[:, None] + 1) * queries > np.arange(columns)[None, :] * keys
    return groups[seen]


def shares(sequences: Iterable[npt.NDArray[Any]], queries: int, keys: int) -> list[float]:
    """The fraction of groups in which some pair matches in at least 1, 2, … 8 tokens."""
    found = np.concatenate([longest_in_groups(tokens, queries, keys) for tokens in sequences])
    return [round(float((found >= order).mean()), 5) for order in range(1, MAXIMUM_MATCHES + 1)]
