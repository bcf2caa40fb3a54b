"""The attention backward in one kernel: launches cuda/attention_fused.cu. Called by `attention_backward`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cllm_gpu.ops.cuda.attention_args import AttentionCall
from cllm_gpu.ops.cuda.checks import blocks_for
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.reference.score_bias import ScoreBias


@dataclass(frozen=True)
class FusedTiles:
    """Tiles of the fused kernel; must match the constants in attention_fused_*.cuh."""

    threads: int
    keys: int
    """Rows of K and V held by a block."""
    queries: int
    """Rows of Q and dO per step."""
    shared_bytes: int
    sums: int
    """Floats of the running sums of dQ per tile of queries of a head; 0 if dq itself holds them."""


def tiles_of(storage: str, head_size: int, score_bias: ScoreBias | None) -> FusedTiles:
    """Threads, tiles and memory of the kernel for a dtype and head size."""
    if storage == "float32":
        row, weights = (head_size + 3) // 4 * 4 + 4, 40
        return FusedTiles(128, 32, 32, 4 * (2 * 32 * row + 2 * 32 * row + 2 * 32 * weights), 0)
    padded = (head_size + 15) // 16 * 16
    row_bytes = 128 * ((padded + 63) // 64)  # pages of 64 columns
    points = score_bias is not None and score_bias.uses_points
    threads = 128 if head_size <= 64 and not points else 256
    queries = 32 if head_size <= 64 or points else 64
    column_parts = threads // 32 // (queries // 16)  # dQ: 16 queries by part_tiles·8 columns for each warp
    part_tiles = 2 * blocks_for(padded // 16, column_parts)
    stage = 2 * row_bytes * queries + 8 * queries
    return FusedTiles(threads, 128, queries, 2 * row_bytes * 128 + 2 * stage + 128 * 128, 4 * threads * part_tiles)


def launch(
    launcher: Launcher, call: AttentionCall, operands: dict[str, Any], saved: dict[str, Any], gradients: dict[str, Any]
) -> Any | None:
    """Compute dq, dk, dv in `gradients`. Returns the partial sums (B, H, tiles, n) of the bias's scalars, or None."""
    batch, length, heads, size = operands["q"].shape
    _, positions, kv_heads, _ = operands["k"].shape
    tiles = tiles_of(call.storage, size, call.score_bias)
    key_tiles, query_tiles = blocks_for(positions, tiles.keys), blocks_for(length, tiles.queries)
    sums = partials = None
    if tiles.sums:
        sums = launcher.scratch("attention_query_sums", (batch * heads * query_tiles * tiles.sums,), "float32")
    if call.score_bias is not None:
        partials = launcher.scratch("score_terms", (batch, heads, key_tiles, call.score_bias.count), "float32")
    everything = operands | gradients
    launcher.launch(
        call.variant("attention_fused.cu"),
        "attention_backward_fused",
        (key_tiles * kv_heads * batch,),
        tiles.threads,
        saved
        | {"query_sums": sums, "term_partials": partials, "turns": launcher.counters(1 + batch * heads * query_tiles)}
        | call.arguments(**everything),
        shared_bytes=tiles.shared_bytes,
        strided=call.strided(everything),
    )
    # without queries there is nothing to sum, whether or not the kernel wrote zeros
    return partials if partials is None or length else partials[:, :, :0]
