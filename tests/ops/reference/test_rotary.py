"""Rotary embedding: relative positions, orthogonality, finite differences, strided views, float32 tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cllm_gpu.ops.reference.rotary import BASE, rotary_backward, rotary_forward, rotary_tables


def rotated(x, *, first=0, positions=64):
    """A rotated copy of x (B, T, H, D) whose tokens stand at first, first + 1, …"""
    cosine, sine = rotary_tables(np, positions, x.shape[-1], x.dtype)
    y = x.copy()
    rotary_forward(np, y, cosine[first : first + x.shape[1]], sine[first : first + x.shape[1]])
    return y


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 6), (1, 7, 2, 10)])
def test_backward_is_the_derivative(shape, generator, gradient_error, within):
    x, dout = generator.standard_normal(shape), generator.standard_normal(shape)
    cosine, sine = rotary_tables(np, shape[1] + 3, shape[-1], np.float64)
    dx = dout.copy()
    rotary_backward(np, dx, cosine[3:], sine[3:])
    within(f"dx {shape}", gradient_error(lambda: float(np.sum(rotated(x, first=3) * dout)), x, dx), 1e-7)


def test_each_pair_turns_by_its_angle():
    """Pair m of position p as a complex number is multiplied by exp(i·p·base^(−2m/D))."""
    x = np.random.default_rng(0).standard_normal((1, 9, 1, 8))
    y = rotated(x)
    for position in range(9):
        for pair in range(4):
            turn = complex(math.cos(a := position * BASE ** (-2 * pair / 8)), math.sin(a))
            expected = complex(x[0, position, 0, pair], x[0, position, 0, pair + 4]) * turn
            got = complex(y[0, position, 0, pair], y[0, position, 0, pair + 4])
            assert abs(got - expected) <= 1e-15 * 8


def test_scores_depend_only_on_the_distance(generator):
    """⟨R_p q, R_s k⟩ is a function of p − s, the property RoPE is made for; angles up to 60 rounded at eps·60."""
    q, k = generator.standard_normal((2, 1, 1, 1, 16))
    for distance in (0, 1, 5):
        scores = [np.sum(rotated(q, first=p + distance) * rotated(k, first=p)) for p in (0, 1, 17, 50)]
        np.testing.assert_allclose(scores, scores[0], rtol=0, atol=16 * 60 * 2.2e-16)


def test_backward_undoes_forward_and_lengths_are_kept(generator):
    x = generator.standard_normal((2, 6, 3, 8))
    y = rotated(x)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-14)
    cosine, sine = rotary_tables(np, 6, 8, np.float64)
    rotary_backward(np, y, cosine, sine)
    np.testing.assert_allclose(y, x, atol=1e-14)


def test_rotates_strided_views_and_leaves_their_neighbours_alone(generator):
    fused = generator.standard_normal((2, 5, 7, 4))  # (B, T, heads of q, k and v, D)
    before = fused.copy()
    cosine, sine = rotary_tables(np, 5, 4, np.float64)
    rotary_forward(np, fused[:, :, 2:5], cosine, sine)
    np.testing.assert_array_equal(fused[:, :, 2:5], rotated(before[:, :, 2:5]))
    np.testing.assert_array_equal(fused[:, :, :2], before[:, :, :2])
    np.testing.assert_array_equal(fused[:, :, 5:], before[:, :, 5:])


def test_float32_tables_are_rounded_once():
    """Far positions keep full accuracy because the angles are float64: half a unit in the last place of 1."""
    single, exact = rotary_tables(np, 4096, 64, np.float32), rotary_tables(np, 4096, 64, np.float64)
    for s, e in zip(single, exact, strict=True):
        assert s.dtype == np.float32
        assert np.max(np.abs(s - e)) <= 2.0**-25
