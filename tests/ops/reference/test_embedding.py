"""Token and position embeddings: finite differences, repeated tokens, determinism, the largest vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.ops.reference.embedding import MAXIMUM_VOCABULARY, embedding_backward, embedding_forward


def forward(tokens, e, p, first=0):
    out = np.full((tokens.size, e.shape[1]), np.nan, e.dtype)
    embedding_forward(np, tokens, e, p, out, first_position=first)
    return out


def backward(dout, tokens, e_shape, p_shape, *, accumulate=False, start=np.nan):
    de = np.full(e_shape, start, dout.dtype)
    dp = None if p_shape is None else np.full(p_shape, start, dout.dtype)
    embedding_backward(
        np, dout, tokens, de, dp, accumulate_tokens=accumulate, accumulate_positions=accumulate
    )  # fmt: skip
    return de, dp


@pytest.mark.parametrize(("batch", "length", "vocabulary", "width"), [(1, 1, 1, 1), (3, 7, 5, 9), (2, 11, 97, 6)])
def test_backward_is_the_derivative(batch, length, vocabulary, width, generator, gradient_error, within):
    tokens = generator.integers(vocabulary, size=(batch, length), dtype=np.int32)
    e, p = generator.standard_normal((vocabulary, width)), generator.standard_normal((length + 2, width))
    dout = generator.standard_normal((batch * length, width))
    de, dp = backward(dout, tokens, e.shape, p.shape)

    def f():
        return float(np.sum(forward(tokens, e, p) * dout))

    within("dE", gradient_error(f, e, de), 1e-7)
    within("dP", gradient_error(f, p, dp), 1e-7)
    np.testing.assert_array_equal(dp[length:], 0)  # positions no token stands at


def test_forward_starts_at_the_given_position(generator):
    tokens = np.array([[2, 0, 2]], np.int32)
    e, p = generator.standard_normal((3, 4)), generator.standard_normal((9, 4))
    np.testing.assert_array_equal(forward(tokens, e, p, first=5), e[[2, 0, 2]] + p[5:8])
    np.testing.assert_array_equal(forward(tokens, e, None), e[[2, 0, 2]])


def test_gradients_accumulate_each_on_its_own(generator):
    tokens, dout = np.array([[1, 1, 0]], np.int32), generator.standard_normal((3, 2))
    de, dp = backward(dout, tokens, (3, 2), (3, 2))
    more = backward(dout, tokens, (3, 2), (3, 2), accumulate=True, start=1.5)
    np.testing.assert_allclose(more[0], de + 1.5, atol=1e-14)
    np.testing.assert_allclose(more[1], dp + 1.5, atol=1e-14)
    tied = [np.ones((3, 2)), np.full((3, 2), np.nan)]
    embedding_backward(np, dout, tokens, *tied, accumulate_tokens=True, accumulate_positions=False)
    np.testing.assert_allclose(tied[0], de + 1, atol=1e-14)
    np.testing.assert_array_equal(tied[1], dp)
    given = np.full((3, 2), np.nan)
    order = np.array([2, 0, 1])  # the positions sorted by their token
    embedding_backward(np, dout, tokens, given, None, accumulate_tokens=False, accumulate_positions=False, order=order)
    np.testing.assert_array_equal(given, de)


def test_equal_bits_every_time(generator):
    """Many repeats of few tokens, float32: the order of a sum is the order of the tokens."""
    tokens = generator.integers(3, size=(4, 500), dtype=np.int32)
    dout = generator.standard_normal((2000, 24)).astype(np.float32)
    whole, _ = backward(dout, tokens, (3, 24), None)
    again, _ = backward(dout, tokens, (3, 24), None)
    np.testing.assert_array_equal(whole, again)
    exact = np.zeros((3, 24))
    np.add.at(exact, tokens.reshape(-1), dout.astype(np.float64))
    # about 670 terms of size 1 added one by one: at most 670·eps·Σ|terms|, typically √670 of that
    assert np.max(np.abs(whole - exact)) <= 670 * np.finfo(np.float32).eps * 670 * 0.8


def test_the_largest_vocabulary(generator):
    last = MAXIMUM_VOCABULARY - 1
    tokens = np.array([[last, 0, last]], np.int32)
    e = np.zeros((MAXIMUM_VOCABULARY, 2), np.float32)
    e[last] = [3, 4]
    np.testing.assert_array_equal(forward(tokens, e, None), [[3, 4], [0, 0], [3, 4]])
    de, _ = backward(np.array([[1, 2], [3, 4], [5, 6]], np.float32), tokens, e.shape, None)
    np.testing.assert_array_equal(de[last], [6, 8])
    np.testing.assert_array_equal(de[0], [3, 4])
    assert np.count_nonzero(de) == 4
