"""Attention forward and backward: launches cuda/attention.cu. As `cllm_gpu.ops.reference.attention`.

lse is always float32. Operands may have any strides as long as their last axis is contiguous, so views into the fused
qkv product are used without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from cllm_gpu.ops.cuda import attention_fused
from cllm_gpu.ops.cuda.attention_args import AttentionCall
from cllm_gpu.ops.cuda.checks import blocks_for
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.score_bias import finish_points, finish_scalars
from cllm_gpu.ops.reference import attention as reference
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients
from cllm_gpu.ops.reference.symmetry import Symmetry
from cllm_gpu.utils.errors import UserError

__all__ = [
    "METHOD",
    "METHODS",
    "BackwardMethod",
    "attention_backward",
    "attention_forward",
    "attention_weights",
]

THREADS = 128
BackwardMethod = Literal["two kernels", "fused"]
METHODS: tuple[BackwardMethod, ...] = get_args(BackwardMethod)
METHOD: BackwardMethod = "two kernels"
"""The backward that is taken where none is named. The fused one does 5/7 of the operations, but its blocks wait for one
another and add dQ up in memory; the two have not been timed yet (bench/kernels does, on a card). Two
kernels need no scratch of dQ's size."""


@dataclass(frozen=True)
class Tiles:
    """Rows per block and bytes of shared memory; must match the constants in attention_*.cuh."""

    forward_rows: int
    forward_shared: int
    query_rows: int
    query_shared: int
    key_rows: int
    key_shared: int


def tiles_of(storage: str, head_size: int, score_bias: ScoreBias | None) -> Tiles:
    """Tiles of the kernels for a dtype and head size; smaller ones if the score bias takes registers."""
    if storage == "float32":
        row, weights = (head_size + 3) // 4 * 4 + 4, 40
        backward = 4 * (2 * 32 * row + 2 * 32 * row + 2 * 32 * weights)
        return Tiles(64, 4 * (64 * row + 2 * 32 * row + 64 * weights), 32, backward, 32, backward)
    row_bytes = 128 * (((head_size + 15) // 16 * 16 + 63) // 64)  # pages of 64 columns
    narrow = head_size <= 64
    forward_keys, query_keys, key_queries = (64, 48, 32) if narrow else (48, 32, 64 if head_size <= 96 else 48)
    if score_bias is not None and score_bias.uses_points:
        forward_keys, query_keys = forward_keys - 16, query_keys - 16
        key_queries -= 0 if narrow else 16
    keys = 128 if narrow else 64
    return Tiles(
        forward_rows=128,
        forward_shared=row_bytes * (128 + 4 * forward_keys),
        query_rows=128,
        query_shared=row_bytes * (2 * 128 + 4 * query_keys),
        key_rows=keys,
        key_shared=row_bytes * (2 * keys + 4 * key_queries) + 16 * key_queries,
    )


def attention_forward(
    launcher: Launcher,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    causal: bool,
    scale: float,
    score_bias: ScoreBias | None = None,
    symmetry: Symmetry | None = None,
) -> None:
    """As the reference; lse float32."""
    call = AttentionCall(
        "attention_forward", q, k, v, causal=causal, scale=scale, score_bias=score_bias, symmetry=symmetry
    )
    call.check("out", out, "B T H D")
    call.check("lse", lse, "B H T")
    call.pad_tokens(launcher)
    tiles = tiles_of(call.storage, q.shape[3], score_bias)
    batch, length, heads, _ = q.shape
    launcher.launch(
        call.variant(),
        "attention_forward",
        (blocks_for(length, tiles.forward_rows) * heads * batch,),
        THREADS,
        {"lse": lse, **call.arguments(q=q, k=k, v=v, out=out)},
        shared_bytes=tiles.forward_shared,
        strided=call.strided({"q": q, "k": k, "v": v, "out": out}),
    )


def attention_backward(
    launcher: Launcher,
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    *,
    causal: bool,
    scale: float,
    score_bias: ScoreBias | None = None,
    dscore_bias: ScoreBiasGradients | None = None,
    symmetry: Symmetry | None = None,
    method: BackwardMethod | None = None,
) -> None:
    """As the reference; dq, dk and dv must not share memory with the inputs.

    `method`: "two kernels" (dk and dv, then dq) or "fused" (all three in one); None for METHOD. Each is deterministic;
    the two differ by rounding. Raises UserError for an unknown method, and for gradients of points with "fused", which
    does not support them.
    """
    call = AttentionCall(
        "attention_backward", q, k, v, causal=causal, scale=scale, score_bias=score_bias, symmetry=symmetry
    )
    for name, array in (("dout", dout), ("out", out), ("dq", dq)):
        call.check(name, array, "B T H D")
    for name, array in (("dk", dk), ("dv", dv)):
        call.check(name, array, "B S K D")
    call.check("lse", lse, "B H T")
    call.expect_gradients(dscore_bias)
    chosen = _method(method, call)
    call.pad_tokens(launcher)
    delta = launcher.scratch("attention_delta", lse.shape, "float32")
    _delta(launcher, call, dout, out, delta)
    operands = {"dout": dout, "q": q, "k": k, "v": v}
    saved = {"lse": lse, "delta": delta}
    gradients = {"dq": dq, "dk": dk, "dv": dv}
    if chosen == "fused":
        partials = attention_fused.launch(launcher, call, operands, saved, gradients)
    else:
        partials = _two_kernels(launcher, call, operands, saved, gradients, dscore_bias)
    if partials is not None and dscore_bias is not None:
        finish_scalars(launcher, call.variant(), partials, dscore_bias.scalars)


def _method(method: BackwardMethod | None, call: AttentionCall) -> BackwardMethod:
    """`method`, or the default that supports the gradients of this call if None."""
    if method is None:
        return "two kernels" if call.point_gradients else METHOD
    if method not in METHODS:
        raise UserError(f"attention_backward: argument method is {method!r}; it must be {' or '.join(METHODS)}")
    if method == "fused" and call.point_gradients:
        raise UserError("attention_backward: gradients of lattice points take the method 'two kernels', not 'fused'")
    return method


def _two_kernels(
    launcher: Launcher,
    call: AttentionCall,
    operands: dict[str, Any],
    saved: dict[str, Any],
    gradients: dict[str, Any],
    dscore_bias: ScoreBiasGradients | None,
) -> Any | None:
    """dk and dv in one kernel, dq in another, gradients of the points in both.

    Returns the partial sums (B, H, tiles, n) of the score bias's scalars; None without a score bias.
    """
    q, k, dq = operands["q"], operands["k"], gradients["dq"]
    tiles = tiles_of(call.storage, q.shape[3], call.score_bias)
    batch, positions, kv_heads, _ = k.shape
    length, heads = q.shape[1:3]
    query_tiles = blocks_for(length, tiles.query_rows)
    partials = of_queries = of_keys = None
    if call.score_bias is not None:
        partials = launcher.scratch("score_terms", (batch, heads, query_tiles, call.score_bias.count), "float32")
    if call.point_gradients:
        of_queries = launcher.scratch("query_points", (batch, heads, length, 3), "float32")
        of_keys = launcher.scratch("key_points", (batch, kv_heads, positions, 3), "float32")
    with_keys = operands | {"dk": gradients["dk"], "dv": gradients["dv"]}
    launcher.launch(
        call.variant(),
        "attention_backward_keys",
        (blocks_for(positions, tiles.key_rows) * kv_heads * batch,),
        THREADS,
        saved | {"point_partials": of_keys} | call.arguments(**with_keys),
        shared_bytes=tiles.key_shared,
        strided=call.strided(with_keys),
    )
    with_queries = operands | {"dq": dq}
    launcher.launch(
        call.variant(),
        "attention_backward_queries",
        (query_tiles * heads * batch,),
        THREADS,
        saved | {"term_partials": partials, "point_partials": of_queries} | call.arguments(**with_queries),
        shared_bytes=tiles.query_shared,
        strided=call.strided(with_queries),
    )
    if call.point_gradients and dscore_bias is not None:
        finish_points(launcher, call.variant(), of_queries, of_keys, dscore_bias.points)
    return partials


def attention_weights(
    launcher: Launcher,
    q: Any,
    k: Any,
    *,
    causal: bool,
    scale: float,
    score_bias: ScoreBias | None = None,
    symmetry: Symmetry | None = None,
) -> Any:
    """As the reference, which computes them on the GPU too; float32."""
    wide_q, wide_k = (x.astype("float32", copy=False) for x in (q, k))
    options: dict[str, Any] = {"causal": causal, "scale": scale, "score_bias": score_bias, "symmetry": symmetry}
    return reference.attention_weights(launcher.xp, wide_q, wide_k, **options)


def _delta(launcher: Launcher, call: AttentionCall, dout: Any, out: Any, delta: Any) -> None:
    """delta (B, H, T) = Σ_d dout·out."""
    batch, length, heads, _ = out.shape
    rows = batch * length * heads
    lanes = next(lanes for lanes in (4, 8, 16, 32) if 4 * lanes >= out.shape[3])  # DELTA_LANES in attention.cu
    sizes = {"rows": rows, "heads": heads, "queries": length, "wide": call.wide(dout=dout, out=out)}
    launcher.launch(
        call.variant(),
        "attention_backward_delta",
        (blocks_for(rows * lanes, THREADS),),
        THREADS,
        {"delta": delta, **call.views(dout=dout, out=out), **sizes},
        strided=frozenset({"dout", "out"}),
    )
