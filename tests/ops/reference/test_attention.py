"""Attention: against an independent formula, finite differences, weights, memory, float32."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest

from cllm_gpu.ops.reference import attention
from cllm_gpu.ops.reference.attention import attention_backward, attention_forward, attention_weights

EPS32 = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Case:
    batch: int
    length: int  # T queries
    positions: int  # S keys
    heads: int
    kv_heads: int
    size: int
    causal: bool

    @property
    def scale(self):
        return 1 / math.sqrt(self.size)


CASES = [
    Case(1, 1, 1, 1, 1, 1, True),
    Case(2, 1, 6, 2, 1, 3, True),  # one new token after five in the cache
    Case(2, 7, 7, 3, 3, 5, True),
    Case(1, 9, 9, 6, 2, 4, True),
    Case(2, 5, 11, 4, 1, 3, True),
    Case(2, 5, 8, 4, 2, 3, False),
    Case(1, 133, 133, 2, 1, 3, True),  # two blocks of queries
]
IDS = [
    f"B{c.batch}T{c.length}S{c.positions}H{c.heads}K{c.kv_heads}D{c.size}{'' if c.causal else 'full'}" for c in CASES
]


def draw(c, generator, dtype=np.float64):
    q = generator.standard_normal((c.batch, c.length, c.heads, c.size))
    k, v = generator.standard_normal((2, c.batch, c.positions, c.kv_heads, c.size))
    dout = generator.standard_normal(q.shape)
    return [x.astype(np.float32).astype(dtype) for x in (q, k, v, dout)]


def forward(c, q, k, v):
    out, lse = np.full(q.shape, np.nan, q.dtype), np.full((c.batch, c.heads, c.length), np.nan, q.dtype)
    attention_forward(np, q, k, v, out, lse, causal=c.causal, scale=c.scale)
    return out, lse


def backward(c, q, k, v, dout):
    out, lse = forward(c, q, k, v)
    gradients = [np.full_like(x, np.nan) for x in (q, k, v)]
    attention_backward(np, dout, q, k, v, out, lse, *gradients, causal=c.causal, scale=c.scale)
    return gradients


def by_the_book(c, q, k, v):
    """out and lse, a query and a head at a time."""
    out, lse = np.empty_like(q), np.empty((c.batch, c.heads, c.length))
    for b, t, h in np.ndindex(c.batch, c.length, c.heads):
        seen = c.positions - c.length + t + 1 if c.causal else c.positions
        shared = h // (c.heads // c.kv_heads)
        scores = c.scale * k[b, :seen, shared] @ q[b, t, h]
        weights = np.exp(scores)
        out[b, t, h] = weights @ v[b, :seen, shared] / weights.sum()
        lse[b, h, t] = math.log(weights.sum())
    return out, lse


@pytest.mark.parametrize("c", CASES, ids=IDS)
def test_forward_is_the_formula(c, generator):
    q, k, v, _ = draw(c, generator)
    for got, expected in zip(forward(c, q, k, v), by_the_book(c, q, k, v), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)  # sums of ≤ 133 terms of size 1


@pytest.mark.parametrize("c", CASES, ids=IDS)
def test_backward_is_the_derivative(c, generator, gradient_error, within):
    q, k, v, dout = draw(c, generator)

    def f():
        return float(np.sum(forward(c, q, k, v)[0] * dout))

    for name, x, dx in zip("qkv", (q, k, v), backward(c, q, k, v, dout), strict=True):
        within(f"d{name}", gradient_error(f, x, dx), 1e-7)


@pytest.mark.parametrize("c", CASES, ids=IDS)
def test_strided_views_as_the_model_has_them(c, generator):
    """q, k, v inside one fused array when T = S, keys and values inside a larger cache: the same bits."""
    q, k, v, dout = draw(c, generator)
    expected = [*forward(c, q, k, v), *backward(c, q, k, v, dout)]
    wide = generator.standard_normal((c.batch, c.positions + 3, c.heads + 2 * c.kv_heads, c.size))
    views = [
        wide[:, : c.length, : c.heads],
        wide[:, : c.positions, c.heads : c.heads + c.kv_heads],
        wide[:, : c.positions, c.heads + c.kv_heads :],
    ]
    for view, value in zip(views, (q, k, v), strict=True):
        view[...] = value
    out, lse = forward(c, *views)
    spread = np.full_like(wide, np.nan)
    gradients = [
        spread[:, : c.length, : c.heads],
        spread[:, : c.positions, c.heads : c.heads + c.kv_heads],
        spread[:, : c.positions, c.heads + c.kv_heads :],
    ]
    attention_backward(np, dout, *views, out, lse, *gradients, causal=c.causal, scale=c.scale)
    for got, wanted in zip((out, lse, *gradients), expected, strict=True):
        # the library may take another road through strided memory: a few roundings of sums of ≤ 133 terms
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("c", CASES, ids=IDS)
def test_weights_are_probabilities_and_give_the_output(c, generator):
    q, k, v, _ = draw(c, generator)
    weights = attention_weights(np, q, k, causal=c.causal, scale=c.scale)
    assert weights.shape == (c.batch, c.heads, c.length, c.positions)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=0, atol=c.positions * 2.2e-16)
    if c.causal:
        future = np.triu(np.ones((c.length, c.positions), bool), c.positions - c.length + 1)
        assert np.all(weights[:, :, future] == 0)
    spread = np.repeat(v, c.heads // c.kv_heads, axis=2)
    np.testing.assert_allclose(np.einsum("bhts,bshd->bthd", weights, spread), forward(c, q, k, v)[0], atol=1e-13)


def test_large_scores_do_not_overflow():
    c = Case(1, 4, 4, 1, 1, 2, True)
    q = np.full((1, 4, 1, 2), 300.0, np.float32)
    k = np.linspace(-300, 300, 8, dtype=np.float32).reshape(1, 4, 1, 2)
    out, lse = forward(c, q, k, k)
    np.testing.assert_allclose(out, k, rtol=1e-6)  # keys grow, so each query sees only its own
    assert np.all(np.isfinite(lse))
    assert all(np.all(np.isfinite(x)) for x in backward(c, q, k, k, np.ones_like(q)))


def test_the_training_path_holds_the_weights_of_one_tile_only():
    """T×T of one head is eight tiles of 128 queries here: the peak stays at a few tiles (the one at work, the one
    before it, which Python lets go a moment later, the mask; backward has two of each), whatever the number of heads.
    """
    c = Case(1, 1024, 1024, 8, 8, 4, True)
    q, k, v, dout = draw(c, np.random.default_rng(1), np.float32)
    out, lse = forward(c, q, k, v)
    gradients = [np.empty_like(x) for x in (q, k, v)]
    tile = c.heads // c.kv_heads * attention.CPU_QUERY_BLOCK * c.positions * 4
    tracemalloc.start()
    try:
        attention_forward(np, q, k, v, out, lse, causal=True, scale=c.scale)
        _, forward_peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        attention_backward(np, dout, q, k, v, out, lse, *gradients, causal=True, scale=c.scale)
        _, backward_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"tiles of {tile} bytes at the peak: forward {forward_peak / tile:.2f}, backward {backward_peak / tile:.2f}")
    assert tile <= forward_peak <= 3 * tile
    assert tile <= backward_peak <= 4 * tile


@pytest.mark.parametrize("c", CASES, ids=IDS)
def test_float32_is_within_rounding_of_float64(c, generator, within):
    """Scores (D terms) move exp by their absolute error, max|s|·D·eps; sums over S in lanes; norms of whole arrays."""
    exact = draw(c, generator)
    single = [x.astype(np.float32) for x in exact]
    largest = c.scale * float(np.max(np.linalg.norm(exact[0], axis=-1)) * np.max(np.linalg.norm(exact[1], axis=-1)))
    bound = (c.size * largest + c.positions / 8 + 10) * EPS32
    out32, out64 = forward(c, *single[:3])[0], forward(c, *exact[:3])[0]
    within("out", float(np.linalg.norm(out32 - out64) / np.linalg.norm(out64)), bound)
    size = float(np.linalg.norm(exact[3]) * (1 + largest))
    for name, s, e in zip("qkv", backward(c, *single), backward(c, *exact), strict=True):
        assert s.dtype == np.float32
        within(f"d{name}", float(np.linalg.norm(s - e)) / size, bound)
