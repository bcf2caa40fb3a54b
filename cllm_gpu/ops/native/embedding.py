"""Token and position embeddings; see `cllm_gpu.ops.reference.embedding`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.native.arguments import INT32, address
from cllm_gpu.ops.native.dropout import dropout_forward
from cllm_gpu.ops.native.library import Library, check_status
from cllm_gpu.ops.reference.dropout import Dropout


def embedding_forward(
    library: Library,
    tokens: Any,
    token_embedding: Any,
    position_embedding: Any | None,
    out: Any,
    *,
    first_position: int = 0,
    dropout: Dropout | None = None,
) -> None:
    """As the reference; all arrays contiguous. Raises IndexError for a token outside the table."""
    kernels, dtype = library.kernels(token_embedding), token_embedding.dtype
    (b, t), (v, c) = tokens.shape, token_embedding.shape
    positions = None
    if position_embedding is not None:
        rows = position_embedding[first_position : first_position + t]
        positions = address("position_embedding", rows, (t, c), dtype)
    status = kernels.embedding_forward(
        b, t, c, v,
        address("tokens", tokens, (b, t), INT32),
        address("token_embedding", token_embedding, (v, c), dtype),
        positions,
        address("out", out, (b * t, c), dtype),
    )  # fmt: skip
    if status:
        check_status(status, "tokens", v)
    if dropout is not None:
        dropout_forward(library, out, out, dropout=dropout)


def embedding_backward(
    library: Library,
    dout: Any,
    tokens: Any,
    dtoken_embedding: Any,
    dposition_embedding: Any | None,
    *,
    accumulate_tokens: bool,
    accumulate_positions: bool,
    order: Any | None = None,
) -> None:
    """As the reference; sums run in the order of the batch and `order` is not used. All arrays contiguous."""
    kernels, dtype = library.kernels(dout), dout.dtype
    (b, t), (v, c) = tokens.shape, dtoken_embedding.shape
    if not accumulate_tokens:
        dtoken_embedding[...] = 0.0
    positions = None
    if dposition_embedding is not None:
        if not accumulate_positions:
            dposition_embedding[...] = 0.0
        positions = address("dposition_embedding", dposition_embedding[:t], (t, c), dtype)
    status = kernels.embedding_backward(
        b, t, c, v,
        address("dout", dout, (b * t, c), dtype),
        address("tokens", tokens, (b, t), INT32),
        address("dtoken_embedding", dtoken_embedding, (v, c), dtype),
        positions,
    )  # fmt: skip
    if status:
        check_status(status, "tokens", v)
