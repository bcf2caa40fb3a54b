"""Scaled dot-product attention; grouped-query attention if there are fewer key/value heads than query heads.

    S = scale·Q Kᵀ (masked),  P = softmax(S),  O = P V,  lse = log Σ_j exp(S_ij)

Backward (Dao et al. 2022, "FlashAttention", appendix B), from the saved O and lse:

    P = exp(S − lse),  dV = Pᵀ dO,  dP = dO Vᵀ,  δ_i = Σ_d dO_id·O_id,  dS = scale·P∘(dP − δ),  dQ = dS K,  dK = dSᵀ Q

The queries are at the last T of the S key positions: with `causal`, query t attends to keys 0 … S − T + t. Weights are
computed for one block of queries of one key/value head at a time (several heads if they fit the cache; on a GPU, one
batch item). `score_bias` is added to S before the mask (`cllm_gpu.ops.reference.score_bias`). With a `symmetry`, for
the tokens at the S positions, q and k are replaced by S(e) q and S(e) k (`cllm_gpu.ops.reference.symmetry`); dq and dk
are the gradients of the original q and k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasBlock, ScoreBiasGradients
from cllm_gpu.ops.reference.symmetry import Symmetry, symmetry_backward, turned
from cllm_gpu.ops.reference.tiling import tile_elements
from cllm_gpu.ops.specification import operation

CPU_QUERY_BLOCK = 128


@operation(writes=("out", "lse"))
def attention_forward(
    xp: Any,
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
    """out (B, T, H, D) and lse (B, H, T) from q (B, T, H, D), k and v (B, S, K, D); K divides H; any strides."""
    q, k = turned(xp, q, symmetry), turned(xp, k, symmetry)
    for b, heads, queries, keys in _blocks(xp, q, k, causal=causal):
        scores = _scores(xp, q, k, b, heads, queries, keys, causal=causal, scale=scale)
        if score_bias is not None:
            _score_bias_block(xp, score_bias, q, k, b, queries, keys).add_to(
                scores, _by_kv_head(score_bias.scalars, k, heads)
            )
        maximum = scores.max(axis=-1, keepdims=True)
        scores -= maximum
        xp.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        product = xp.matmul(scores, _kv(v, b, heads, keys))
        product /= total
        _by_group(out, k, b, heads, queries)[...] = product
        maximum += xp.log(total)
        _lse(lse, k, b, heads, queries)[...] = maximum[..., 0]


@operation(writes=("dq", "dk", "dv", "dscore_bias"))
def attention_backward(
    xp: Any,
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
) -> None:
    """dq, dk, dv (shapes of q, k, v; any strides) from dout (B, T, H, D) and the forward's inputs and outputs.

    With `score_bias`, the gradients of its scalars and points are added to those in `dscore_bias`.
    """
    q, k = turned(xp, q, symmetry), turned(xp, k, symmetry)
    dk[...] = 0.0
    dv[...] = 0.0
    for b, heads, queries, keys in _blocks(xp, q, k, causal=causal):
        key, value = _kv(k, b, heads, keys), _kv(v, b, heads, keys)
        g = _by_group(dout, k, b, heads, queries)
        weights = _scores(xp, q, k, b, heads, queries, keys, causal=causal, scale=scale)
        block = None
        if score_bias is not None:
            block, scalars = (
                _score_bias_block(xp, score_bias, q, k, b, queries, keys),
                _by_kv_head(score_bias.scalars, k, heads),
            )
            block.add_to(weights, scalars)
        weights -= _lse(lse, k, b, heads, queries)[..., None]
        xp.exp(weights, out=weights)
        _kv(dv, b, heads, keys)[...] += xp.matmul(weights.swapaxes(-1, -2), g).sum(axis=1, keepdims=True)
        delta = (g * _by_group(out, k, b, heads, queries)).sum(axis=-1, keepdims=True)
        dscores = xp.matmul(g, value.swapaxes(-1, -2))
        dscores -= delta
        dscores *= weights
        if block is not None and dscore_bias is not None:
            block.add_gradients(dscores, scalars, _by_kv_head(dscore_bias.scalars, k, heads), dscore_bias.points)
        dscores *= scale
        _by_group(dq, k, b, heads, queries)[...] = xp.matmul(dscores, key)
        query = _by_group(q, k, b, heads, queries)
        _kv(dk, b, heads, keys)[...] += xp.matmul(dscores.swapaxes(-1, -2), query).sum(axis=1, keepdims=True)
    if symmetry is not None:
        symmetry_backward(xp, dq, symmetry)
        symmetry_backward(xp, dk, symmetry)


@operation(sides=("cuda",))  # people look at weights, training never does
def attention_weights(
    xp: Any,
    q: Any,
    k: Any,
    *,
    causal: bool,
    scale: float,
    score_bias: ScoreBias | None = None,
    symmetry: Symmetry | None = None,
) -> Any:
    """Attention weights P (B, H, T, S), for inspection: O(T·S) memory, never used in training."""
    q, k = turned(xp, q, symmetry), turned(xp, k, symmetry)
    batch, length, heads, _ = q.shape
    weights = xp.zeros((batch, heads, length, k.shape[1]), dtype=q.dtype)
    group = heads // k.shape[2]
    for b, kv_heads, queries, keys in _blocks(xp, q, k, causal=causal):
        scores = _scores(xp, q, k, b, kv_heads, queries, keys, causal=causal, scale=scale)
        if score_bias is not None:
            _score_bias_block(xp, score_bias, q, k, b, queries, keys).add_to(
                scores, _by_kv_head(score_bias.scalars, k, kv_heads)
            )
        scores -= scores.max(axis=-1, keepdims=True)
        xp.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        rows = slice(kv_heads.start * group, kv_heads.stop * group)
        weights[b, rows, queries, keys] = scores.reshape(-1, *scores.shape[2:])
    return weights


def _blocks(xp: Any, q: Any, k: Any, *, causal: bool) -> Iterator[tuple[int, slice, slice, slice]]:
    """(batch item, key/value heads, queries, keys that those queries attend to)."""
    batch, length = q.shape[:2]
    positions, kv_heads = k.shape[1:3]
    on_cpu = xp.__name__ == "numpy"
    query_step = min(length, CPU_QUERY_BLOCK) if on_cpu else length
    head_weights = q.shape[2] // kv_heads * query_step * positions
    head_step = max(1, tile_elements(xp) // head_weights) if on_cpu else kv_heads
    for b in range(batch):
        for head in range(0, kv_heads, head_step):
            for start in range(0, length, query_step):
                stop = min(start + query_step, length)
                seen = positions - length + stop if causal else positions
                yield b, slice(head, min(head + head_step, kv_heads)), slice(start, stop), slice(0, seen)


def _kv(x: Any, b: int, heads: slice, rows: slice) -> Any:
    """View (heads, 1, rows, D) of x (B, S, K, D)."""
    return x[b, rows, heads].swapaxes(0, 1)[:, None]


def _by_group(x: Any, k: Any, b: int, heads: slice, rows: slice) -> Any:
    """View (kv heads, group, rows, D) of x (B, T, H, D): the query heads that share a key/value head."""
    length, query_heads, size = x.shape[1:]
    kv_heads = k.shape[2]
    grouped = x[b].reshape(length, kv_heads, query_heads // kv_heads, size)
    return grouped[rows, heads].transpose(1, 2, 0, 3)


def _lse(lse: Any, k: Any, b: int, heads: slice, rows: slice) -> Any:
    """View (kv heads, group, rows) of lse (B, H, T)."""
    return lse[b].reshape(k.shape[2], -1, lse.shape[2])[heads, :, rows]


def _scores(
    xp: Any, q: Any, k: Any, b: int, heads: slice, queries: slice, keys: slice, *, causal: bool, scale: float
) -> Any:
    """Masked scale·Q Kᵀ of one block: (kv heads, group, queries, keys)."""
    scores = xp.matmul(_by_group(q, k, b, heads, queries), _kv(k, b, heads, keys).swapaxes(-1, -2))
    scores *= scale
    if causal:
        count = queries.stop - queries.start
        future = xp.triu(xp.full((count, count), -xp.inf, dtype=scores.dtype), 1)
        scores[..., keys.stop - count :] += future
    return scores


def _score_bias_block(
    xp: Any, score_bias: ScoreBias, q: Any, k: Any, b: int, queries: slice, keys: slice
) -> ScoreBiasBlock:
    """Score bias of one block; `queries` counts from the first query, positions from the first key."""
    before = k.shape[1] - q.shape[1]
    return ScoreBiasBlock(xp, score_bias, b, slice(before + queries.start, before + queries.stop), keys, q.dtype)


def _by_kv_head(scalars: Any, k: Any, heads: slice) -> Any:
    """View (kv heads, group, n) of scalars (H, n)."""
    return scalars.reshape(k.shape[2], -1, scalars.shape[1])[heads]
