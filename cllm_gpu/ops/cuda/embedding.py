"""Token and position embeddings: launches cuda/embedding.cu. As `cllm_gpu.ops.reference.embedding`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes, blocks_for, is_wide, storage_of
from cllm_gpu.ops.cuda.dropout import mask_arguments
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.utils.errors import UserError

THREADS = 256
SEGMENT = 64  # sorted positions of one block: SEGMENT in embedding.cu


def embedding_forward(
    launcher: Launcher,
    tokens: Any,
    token_embedding: Any,
    position_embedding: Any | None,
    out: Any,
    *,
    first_position: int = 0,
    dropout: Dropout | None = None,
) -> None:
    """As the reference; tokens must be in [0, V), which is not checked."""
    check = Shapes("embedding_forward", N=tokens.size)
    _, length = check("tokens", tokens, "B T")
    rows, columns = check("out", out, "N C")
    check("token_embedding", token_embedding, "V C")
    positions = check("position_embedding", position_embedding, "P C")
    if positions and first_position + length > positions[0]:
        raise UserError(
            f"embedding_forward: argument position_embedding has {positions[0]} positions; "
            f"{length} from {first_position} on need {first_position + length}"
        )
    wide = is_wide(columns, token_embedding, position_embedding, out)
    packs = columns // (16 // out.dtype.itemsize if wide else 1)
    launcher.launch(
        Variant("embedding.cu", storage_of("embedding_forward", "out", out)),
        "embedding_forward",
        (blocks_for(rows * packs, THREADS),),
        THREADS,
        {
            "tokens": tokens,
            "token_embedding": token_embedding,
            "position_embedding": position_embedding,
            "out": out,
            "rows": rows,
            "length": length,
            "columns": columns,
            "first_position": first_position,
            **mask_arguments(launcher, dropout),
            "wide": int(wide),
        },
    )


def embedding_backward(
    launcher: Launcher,
    dout: Any,
    tokens: Any,
    dtoken_embedding: Any,
    dposition_embedding: Any | None,
    *,
    accumulate_tokens: bool,
    accumulate_positions: bool,
    order: Any | None = None,
) -> None:
    """As the reference; if `order` is None, the tokens are sorted here, which allocates memory."""
    check = Shapes("embedding_backward", N=tokens.size)
    check("tokens", tokens, "B T")
    check("dout", dout, "N C")
    check("order", order, "N")
    check("dtoken_embedding", dtoken_embedding, "V C")
    positions = check("dposition_embedding", dposition_embedding, "P C")
    if positions and tokens.shape[1] > positions[0]:
        raise UserError(
            f"embedding_backward: argument dposition_embedding has {positions[0]} positions; "
            f"tokens have {tokens.shape[1]}"
        )
    if not accumulate_tokens:
        dtoken_embedding[...] = 0
    _tokens(launcher, dout, tokens, dtoken_embedding, order)
    if dposition_embedding is not None:
        _positions(launcher, dout, tokens, dposition_embedding, accumulate=accumulate_positions)


def _tokens(launcher: Launcher, dout: Any, tokens: Any, dtoken_embedding: Any, order: Any | None) -> None:
    rows, columns = dout.shape
    if order is None:
        order = launcher.xp.argsort(tokens.reshape(-1), kind="stable")
    segments = blocks_for(rows, SEGMENT)
    variant = Variant("embedding.cu", storage_of("embedding_backward", "dout", dout), dtoken_embedding.dtype.name)
    partials = launcher.scratch("embedding", (2, segments, columns), "float32")
    common = {
        "tokens": tokens,
        "order": order,
        "dtoken_embedding": dtoken_embedding,
        "heads": partials[0],
        "tails": partials[1],
        "rows": rows,
        "columns": columns,
    }
    grid = (segments, blocks_for(columns, THREADS))
    launcher.launch(variant, "embedding_backward", grid, THREADS, {"dout": dout, **common})
    launcher.launch(variant, "embedding_backward_join", grid, THREADS, common)


def _positions(launcher: Launcher, dout: Any, tokens: Any, dposition_embedding: Any, *, accumulate: bool) -> None:
    batch, length = tokens.shape
    columns = dout.shape[1]
    if not accumulate:
        dposition_embedding[length:] = 0
    variant = Variant("embedding.cu", storage_of("embedding_backward", "dout", dout), dposition_embedding.dtype.name)
    launcher.launch(
        variant,
        "embedding_backward_positions",
        (blocks_for(length * columns, THREADS),),
        THREADS,
        {
            "dout": dout,
            "dposition_embedding": dposition_embedding,
            "batch": batch,
            "length": length,
            "columns": columns,
            "accumulate": int(accumulate),
        },
    )
