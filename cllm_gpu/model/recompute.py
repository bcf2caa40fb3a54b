"""How much of a block's forward is kept for its backward; the rest is computed again there, from what is kept.

    none       everything is kept
    pointwise  all but the outputs of both layer norms and of GELU: two residual streams, qkv, attention's output, the
               MLP before GELU, a few numbers per row
    block      only the residual stream at the block's beginning; its whole forward is run again

What a block does not keep lies in one set of arrays that all blocks share. The backward goes through the blocks from
the last to the first, so the last block's own values are still there when it begins.

Source: Chen et al. 2016, "Training deep nets with sublinear memory cost"; of the pointwise kind, Korthikanti et al.
2022, "Reducing activation recomputation in large transformer models".
"""

from __future__ import annotations

from typing import Literal, get_args

Recompute = Literal["none", "pointwise", "block"]
LEVELS: tuple[Recompute, ...] = get_args(Recompute)
"""From the most memory to the least."""


def is_kept(level: Recompute, recomputed: Recompute | None) -> bool:
    """Whether every block keeps an array that is computed again from the level `recomputed` on (None: at none)."""
    return recomputed is None or LEVELS.index(level) < LEVELS.index(recomputed)
