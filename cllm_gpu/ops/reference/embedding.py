"""Token and position embeddings: out[b, t] = E[token(b, t)] + P[first_position + t], followed by dropout.

Backward, with dout the gradient before dropout: dE[v] = Σ dout over all positions with token v;
dP[p] = Σ_b dout[b, p − first_position].
Sums run over tokens in sorted order, so the result does not depend on any schedule.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.reference.arguments import require_dtype, require_ids, require_shape
from cllm_gpu.ops.reference.dropout import Dropout, dropout_forward
from cllm_gpu.ops.specification import operation

MAXIMUM_VOCABULARY = 2**20
"""Largest vocabulary an embedding supports."""


@operation(writes=("out",))
def embedding_forward(
    xp: Any,
    tokens: Any,
    token_embedding: Any,
    position_embedding: Any | None,
    out: Any,
    *,
    first_position: int = 0,
    dropout: Dropout | None = None,
) -> None:
    """out (B·T, C) from tokens (B, T) int32, token_embedding (V, C) and position_embedding (P, C) unless None."""
    batch, length = tokens.shape
    require_ids(xp, "tokens", tokens, token_embedding.shape[0])
    require_dtype(out.dtype, token_embedding=token_embedding, position_embedding=position_embedding)
    require_shape("out", out, (batch * length, token_embedding.shape[1]))
    xp.take(token_embedding, tokens.reshape(-1), axis=0, out=out)
    if position_embedding is not None:
        by_position = out.reshape(batch, length, -1)
        by_position += position_embedding[first_position : first_position + length]
    if dropout is not None:
        dropout_forward(xp, out, out, dropout=dropout)


@operation(writes=("dtoken_embedding", "dposition_embedding"))
def embedding_backward(
    xp: Any,
    dout: Any,
    tokens: Any,
    dtoken_embedding: Any,
    dposition_embedding: Any | None,
    *,
    accumulate_tokens: bool,
    accumulate_positions: bool,
    order: Any | None = None,
) -> None:
    """From dout (B·T, C): dtoken_embedding (V, C), and dposition_embedding (P, C) unless None (positions from 0).

    order: (B·T,) int64, the indices that stably sort the tokens; None to compute them here.
    """
    batch, length = tokens.shape
    require_ids(xp, "tokens", tokens, dtoken_embedding.shape[0])
    require_shape("dout", dout, (batch * length, dtoken_embedding.shape[1]))
    if not accumulate_tokens:
        dtoken_embedding[...] = 0.0
    flat = tokens.reshape(-1)
    if order is None:
        order = xp.argsort(flat, kind="stable")
    values, starts = xp.unique(flat[order], return_index=True)
    # gathered row blocks are as wide as dout; columns are independent, so cut them to bound the temporary
    width = dout.shape[1]
    step = max(1, min(width, (1 << 25) // max(1, flat.size)))
    for start in range(0, width, step):
        columns = slice(start, start + step)
        dtoken_embedding[values, columns] += xp.add.reduceat(dout[order, columns], starts, axis=0)
    if dposition_embedding is not None:
        if not accumulate_positions:
            dposition_embedding[...] = 0.0
        dposition_embedding[:length] += dout.reshape(batch, length, width).sum(axis=0)
