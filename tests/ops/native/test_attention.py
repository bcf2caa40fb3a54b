"""Native attention against the reference: odd shapes, grouped heads, caches longer than the queries, strided views."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cllm_gpu.ops.native.attention import attention_forward
from cllm_gpu.ops.reference import attention as reference

# B, T queries, S keys, H, K, D, causal
CASES = [
    (1, 1, 1, 1, 1, 1, True),
    (2, 1, 6, 2, 1, 3, True),
    (2, 7, 7, 3, 3, 5, True),
    (1, 33, 33, 6, 2, 16, True),
    (2, 5, 40, 4, 1, 33, True),
    (2, 35, 48, 4, 2, 7, False),
    (1, 64, 64, 2, 2, 64, True),
    (1, 133, 135, 2, 1, 12, True),
    (1, 300, 301, 1, 1, 20, True),  # several blocks of queries in the backward
]


def _forward_arrays(case, generator):
    """Views of one wide array, as the model has them."""
    b, t, s, h, kv, d, _ = case
    wide = generator.standard_normal((b, s, h + 2 * kv, d))
    q, k, v = wide[:, s - t :, :h], wide[:, :, h : h + kv], wide[:, :, h + kv :]
    return [q, k, v, np.zeros((b, t, h, d)), np.zeros((b, h, t))]


@pytest.mark.parametrize("case", CASES)
def test_forward(agree, generator, case):
    *_, s, _h, _kv, d, causal = case
    agree("attention_forward", _forward_arrays(case, generator), terms=s + d, causal=causal, scale=1 / math.sqrt(d))


@pytest.mark.parametrize("case", CASES)
def test_backward(agree, generator, case):
    b, t, s, h, kv, d, causal = case
    settings = {"causal": causal, "scale": 1 / math.sqrt(d)}
    q, k, v, out, lse = _forward_arrays(case, generator)
    reference.attention_forward(np, q, k, v, out, lse, **settings)
    gradients = np.zeros((b, s, h + 2 * kv, d))
    dq, dk, dv = gradients[:, s - t :, :h], gradients[:, :, h : h + kv], gradients[:, :, h + kv :]
    dout = generator.standard_normal(q.shape)
    # float32 keeps out and lse rounded: the error of each is as large again as the products'
    agree("attention_backward", [dout, q, k, v, out, lse, dq, dk, dv], terms=2 * (s + t * h // kv + d), **settings)


def test_large_scores_do_not_overflow(library):
    """Scores of ±1e4: the row maximum is subtracted first."""
    q = np.full((1, 3, 1, 4), 100.0, np.float32)
    k = q * np.array([1.0, -1.0, 1.0], np.float32)[None, :, None, None]
    v = np.arange(12, dtype=np.float32).reshape(1, 3, 1, 4)
    out, lse = np.empty_like(q), np.empty((1, 1, 3), np.float32)
    attention_forward(library, q, k, v, out, lse, causal=True, scale=0.25)
    assert np.array_equal(out[0, 1], v[0, 0])
    assert np.array_equal(out[0, 2], (v[0, 0] + v[0, 2]) / 2)


def test_later_keys_do_not_matter(library, generator):
    """Causal: changing key and value 20 changes no output before query 20, and every one from there on."""
    q, k, v = generator.standard_normal((3, 1, 40, 2, 8)).astype(np.float32)
    results = []
    for change in (0.0, 1.0):
        k[:, 20] += change
        v[:, 20] += change
        out, lse = np.empty_like(q), np.empty((1, 2, 40), np.float32)
        attention_forward(library, q, k, v, out, lse, causal=True, scale=0.3)
        results.append(out)
    assert np.array_equal(results[0][:, :20], results[1][:, :20])
    assert np.all(results[0][:, 20:] != results[1][:, 20:])
