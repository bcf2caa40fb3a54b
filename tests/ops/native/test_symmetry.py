"""The lattice's symmetry in the native attention and rotary embedding, against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cllm_gpu.model.lattice import symmetry_turns
from cllm_gpu.ops.native.rotary import rotary_forward
from cllm_gpu.ops.native.symmetry import symmetry_backward, symmetry_forward
from cllm_gpu.ops.reference import attention as reference
from cllm_gpu.ops.reference.symmetry import ELEMENTS, Symmetry

# B, T, S, H, K, D, pairs
CASES = [(1, 1, 1, 1, 1, 2, 1), (2, 5, 7, 4, 2, 6, 2), (2, 30, 30, 2, 2, 35, 17), (1, 26, 40, 2, 1, 64, 8)]


def _symmetry(generator, batch, positions, pairs):
    """Every element where there are positions enough."""
    tokens = generator.permutation(batch * positions).reshape(batch, positions) + 1000 * ELEMENTS
    return Symmetry(tokens.astype(np.int32), symmetry_turns(pairs))


@pytest.mark.parametrize(("b", "t", "s", "h", "kv", "d", "pairs"), CASES)
def test_attention(agree, generator, b, t, s, h, kv, d, pairs):
    """Views of one wide array, queries the last of the positions; what is read is left as it was."""
    wide = generator.standard_normal((b, s, h + 2 * kv, d))
    q, k, v = wide[:, s - t :, :h], wide[:, :, h : h + kv], wide[:, :, h + kv :]
    settings = {"causal": True, "scale": 1 / math.sqrt(d), "symmetry": _symmetry(generator, b, s, pairs)}
    out, lse, before = np.zeros((b, t, h, d)), np.zeros((b, h, t)), wide.copy()
    agree("attention_forward", [q, k, v, out, lse], terms=s + d, **settings)
    reference.attention_forward(np, q, k, v, out, lse, **settings)
    gradients = np.zeros((b, s, h + 2 * kv, d))
    dq, dk, dv = gradients[:, s - t :, :h], gradients[:, :, h : h + kv], gradients[:, :, h + kv :]
    arrays = [generator.standard_normal(q.shape), q, k, v, out, lse, dq, dk, dv]
    # float32 keeps out and lse rounded: the error of each is as large again as the products'
    agree("attention_backward", arrays, terms=2 * (s + t * h // kv + d), **settings)
    np.testing.assert_array_equal(wide, before)


@pytest.mark.parametrize(("b", "t", "s", "h", "kv", "d", "pairs"), [(1, 1, 3, 1, 1, 2, 1), (2, 5, 7, 3, 3, 6, 3)])
def test_rotary(agree, generator, b, t, s, h, kv, d, pairs):
    """Pairs that reach over half of the head; other heads stay."""
    wide = generator.standard_normal((b, t, h + 2, d))
    angles, symmetry = generator.standard_normal((t, d // 2)), _symmetry(generator, b, s, pairs)
    for name in ("rotary_forward", "rotary_backward"):
        agree(name, [wide[:, :, 1 : h + 1], np.cos(angles), np.sin(angles)], terms=6, symmetry=symmetry)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pairs", [0, 1, 3, 9])
def test_all_else_is_left(library, generator, dtype, pairs):
    """Dimensions beyond the pairs and the heads around keep every bit, NaN included."""
    wide = np.full((2, 3, 3, 20), np.nan, dtype)
    x = wide[:, :, 1, : 2 * pairs]
    x[...] = generator.standard_normal(x.shape)
    symmetry = Symmetry(generator.integers(0, 99, (2, 3)).astype(np.int32), symmetry_turns(pairs).astype(dtype))
    for operation in (symmetry_forward, symmetry_backward):
        operation(library, wide[:, :, 1:2], symmetry)
    assert np.isfinite(x).all()
    x[...] = np.nan
    assert np.isnan(wide).all()


def test_what_it_cannot_take_is_named(library):
    x, tokens, turns = np.zeros((1, 2, 1, 4), np.float32), np.zeros((1, 2), np.int32), symmetry_turns(2).astype("f4")
    table = np.ones((2, 2), np.float32)

    def rotate(symmetry):
        rotary_forward(library, x, table, table, symmetry=symmetry)

    rotate(Symmetry(tokens, turns))
    for wrong in (tokens.astype(np.int64), tokens[:, :1], np.zeros((2, 2), np.int32)):
        with pytest.raises(ValueError, match=r"symmetry\.tokens is .*; expected int32, at least \(1, 2\)"):
            rotate(Symmetry(wrong, turns))
    with pytest.raises(ValueError, match=r"symmetry\.turns is float64 .*expected float32 \(24, 2, 2\)"):
        rotate(Symmetry(tokens, turns.astype(np.float64)))
    with pytest.raises(ValueError, match=r"symmetry\.turns is .*\(12, 2, 2\).*expected float32 \(24, 2, 2\)"):
        rotate(Symmetry(tokens, turns[:12]))
    with pytest.raises(ValueError, match=r"symmetry has 3 pairs, .*the 4 dimensions of x"):
        rotate(Symmetry(tokens, symmetry_turns(3)))
