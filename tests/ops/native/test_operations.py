"""Every native operation against the reference, over odd shapes."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.ops.native import dropout as native_dropout
from cllm_gpu.ops.native.gelu import gelu_backward
from cllm_gpu.ops.native.squared_norm import squared_norm
from cllm_gpu.ops.reference import dropout as reference_dropout
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.ops.reference.squared_norm import squared_norm as reference_squared_norm

MASK = Dropout(0.3, seed=2**63 + 5, step=7, site=3, first_element=13)
ROWS = [(1, 1), (3, 7), (5, 16), (2, 33), (9, 100), (130, 48)]


@pytest.mark.parametrize(
    ("n", "k", "m"), [(1, 1, 1), (1, 5, 3), (15, 16, 33), (29, 17, 31), (7, 400, 40), (400, 9, 50), (3, 5, 1600)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(agree, generator, n, k, m, bias):
    normal = generator.standard_normal
    x, weight, dout = normal((n, k)), normal((m, k)), normal((n, m))
    agree("linear_forward", [x, weight, normal(m) if bias else None, normal((n, m))], terms=k)
    for accumulate in (False, True):
        sums = [normal((m, k)), normal(m) if bias else None]
        agree("linear_backward", [dout, x, weight, normal((n, k)), *sums], terms=max(n, m), accumulate=accumulate)
    agree("linear_backward", [dout, x, weight, None, *sums], terms=max(n, m), accumulate=False)


@pytest.mark.parametrize(("n", "m"), ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_gelu(agree, generator, n, m, bias):
    x = 3 * generator.standard_normal((n, m))
    x[0, 0] = 1.0  # a scale: for a lone negative number the reference's 1 + tanh cancels digits
    agree("gelu_forward", [x, generator.standard_normal(m) if bias else None, np.zeros((n, m))], terms=8)
    for accumulate in (False, True):
        sums = generator.standard_normal(m) if bias else None
        arrays = [generator.standard_normal((n, m)), x, np.zeros((n, m)), sums]
        agree("gelu_backward", arrays, terms=8 + n, accumulate=accumulate)


def test_gelu_backward_may_overwrite_its_input(library, generator):
    x, dout = generator.standard_normal((2, 6, 37))
    apart = np.empty_like(x)
    gelu_backward(library, dout, x, apart, None, accumulate=False)
    gelu_backward(library, dout, x, dout, None, accumulate=False)
    assert np.array_equal(apart, dout)


@pytest.mark.parametrize(("n", "c", "m"), [(1, 1, 1), (5, 7, 19), (33, 16, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp(agree, generator, n, c, m, bias):
    def normal(*shape):
        return generator.standard_normal(shape)

    x, up, down = normal(n, c), normal(m, c), normal(c, m)
    biases = (normal(m), normal(c)) if bias else (None, None)
    kept = [np.zeros((n, m)), np.zeros((n, m))]
    agree("mlp_forward", [x, up, biases[0], down, biases[1], *kept, np.zeros((n, c))], terms=8 + c + m)
    for accumulate in (False, True):
        gradients = [normal(m, c), normal(m) if bias else None, normal(c, m), normal(c) if bias else None]
        arrays = [normal(n, c), x, normal(n, m), normal(n, m), up, down, np.zeros((n, m)), np.zeros((n, c))]
        agree("mlp_backward", arrays + gradients, terms=8 + c + m + n, accumulate=accumulate)


@pytest.mark.parametrize(("n", "c"), [(n, c) for n, c in ROWS if c > 1])
@pytest.mark.parametrize("bias", [True, False])
def test_layernorm(agree, generator, n, c, bias):
    normal = generator.standard_normal
    x, weight, shift = normal((n, c)), normal(c), normal(c) if bias else None
    out, mean, rstd = np.zeros((n, c)), np.zeros(n), np.zeros(n)
    agree("layernorm_forward", [x, weight, shift, out, mean, rstd], terms=c, epsilon=1e-5)
    mean, rstd = x.mean(axis=1), 1 / np.sqrt(x.var(axis=1) + 1e-5)
    for accumulate in (False, True):
        sums = [normal(c), normal(c) if bias else None]
        for dresidual in (normal((n, c)), None):
            arrays = [normal((n, c)), x, weight, mean, rstd, dresidual, np.zeros((n, c)), None, *sums]
            agree("layernorm_backward", arrays, terms=4 * (n + c), accumulate=accumulate, dropout=None)
            arrays[7] = np.zeros((n, c))
            agree("layernorm_backward", arrays, terms=4 * (n + c), accumulate=accumulate, dropout=MASK)


@pytest.mark.parametrize(("n", "c"), [(3, 7), (9, 100)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_residual_layernorm(agree, generator, n, c, rate):
    normal = generator.standard_normal
    dropout = Dropout(rate, seed=2**63 + 5, step=7, site=3, first_element=13) if rate else None
    branch = normal((n, c)).astype(np.float32).astype(np.float64)
    arrays = [normal((n, c)), branch, normal(c), normal(c), *np.zeros((2, n, c)), np.zeros(n), np.zeros(n)]
    agree("residual_layernorm_forward", arrays, terms=2 * c, epsilon=1e-5, dropout=dropout)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 3, 64, 257])
@pytest.mark.parametrize("first", [0, 1, 6, 2**34 - 5])
def test_dropout_bits(library, generator, dtype, size, first):
    """Bit for bit, at any first element, also where the counter's low word overflows."""
    dropout = Dropout(0.4, seed=2**64 - 3, step=2**31 + 9, site=5, first_element=first)
    x = generator.standard_normal(size).astype(dtype)
    for name in ("dropout_forward", "dropout_backward"):
        results = []
        for side, argument in ((reference_dropout, np), (native_dropout, library)):
            out = x.copy()
            getattr(side, name)(argument, out, out, dropout=dropout)
            results.append(out)
        assert np.array_equal(*results)


@pytest.mark.parametrize(("b", "t", "c", "v"), [(1, 1, 1, 1), (3, 5, 7, 4), (2, 9, 33, 50)])
@pytest.mark.parametrize("positions", [True, False])
def test_embedding(agree, generator, b, t, c, v, positions):
    normal = generator.standard_normal
    tokens = generator.integers(0, v, (b, t)).astype(np.int32)
    table = normal((t + 3, c)) if positions else None
    for dropout in (None, MASK):
        arrays = [tokens, normal((v, c)), table, normal((b * t, c))]
        agree("embedding_forward", arrays, terms=2, first_position=2, dropout=dropout)
    for accumulate in (False, True):
        agree(
            "embedding_backward", [normal((b * t, c)), tokens, normal((v, c)), table], terms=b * t + 1,
            accumulate_tokens=accumulate, accumulate_positions=accumulate,
        )  # fmt: skip


@pytest.mark.parametrize(("b", "t", "h", "d"), [(1, 1, 1, 2), (2, 5, 3, 6), (2, 3, 2, 34)])
def test_rotary(agree, generator, b, t, h, d):
    wide = generator.standard_normal((b, t, h + 2, d))
    angles = generator.standard_normal((t, d // 2))
    for name in ("rotary_forward", "rotary_backward"):
        agree(name, [wide[:, :, 1 : h + 1], np.cos(angles), np.sin(angles)], terms=3)


@pytest.mark.parametrize(("n", "v"), ROWS)
def test_cross_entropy(agree, generator, n, v):
    logits = 5 * generator.standard_normal((n, v))
    targets = generator.integers(-1, v, n).astype(np.int32)
    for scale in (None, 0.25):
        arrays = [logits, targets, np.zeros(n)]
        agree("cross_entropy", arrays, terms=v + 16, ignore_index=-1, gradient_scale=scale)


@pytest.mark.parametrize(("size", "decayed"), [(1, 0), (37, 37), (1500, 1030), (5000, 16)])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam(agree, generator, size, decayed, decoupled):
    p, g, m = generator.standard_normal((3, size))
    agree(
        "adam_step", [p, g, m, generator.random(size) + 0.1], terms=16 + 1024,  # rounded squares are summed
        rate=0.01, beta1=0.9, beta2=0.99, epsilon=1e-8, step=3, weight_decay=0.1, decayed=decayed,
        decoupled=decoupled, gradient_scale=0.7,
    )  # fmt: skip


@pytest.mark.parametrize(("size", "decayed"), [(1, 0), (37, 37), (1500, 1030)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(agree, generator, size, decayed, momentum):
    p, g, u = generator.standard_normal((3, size))
    settings = {"rate": 0.01, "momentum": momentum, "weight_decay": 0.1, "decayed": decayed, "gradient_scale": 0.7}
    agree("sgd_step", [p, g, u if momentum else None], terms=16 + size, **settings)


@pytest.mark.parametrize("size", [1, 15, 16, 1000, 100_003])
def test_squared_norm(library, generator, size):
    x = (1e25 * generator.standard_normal(size)).astype(np.float32)  # squares overflow float32, not float64
    want = reference_squared_norm(np, x)
    assert abs(squared_norm(library, x) - want) <= 1e-12 * want
