"""Additive terms of the attention scores, and the gradients of their weights, against dense float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_gpu.errors import UserError
from cllm_gpu.fused.attention import BackwardMethod, CoordinateTerms, attention_backward, attention_forward
from tests.fused.comparison import close
from tests.fused.devices import DTYPES, Device
from tests.fused.test_attention import EITHER

# B, T, S, H, K, D
SIZES = [(2, 70, 70, 2, 2, 64), (2, 70, 140, 2, 2, 64), (1, 40, 127, 4, 2, 128), (1, 64, 64, 2, 1, 24)]


def _coordinates(rng: Any, batch: int, positions: int) -> np.ndarray[Any, Any]:
    """x, y, z like a lattice's, and an id of few values so that some are equal."""
    c = rng.standard_normal((batch, positions, 4)).astype(np.float32)
    c[..., 3] = rng.integers(1, 5, (batch, positions)).astype(np.int32).view(np.float32)
    return c


def _dense(q: Any, k: Any, v: Any, dout: Any, c: Any, weights: Any, *, causal: bool, scale: float) -> dict[str, Any]:
    """The whole computation in float64 with T×S arrays."""
    heads, kv_heads, length, positions = q.shape[2], k.shape[2], q.shape[1], k.shape[1]
    group = heads // kv_heads
    q, k, v, dout = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (q, k, v, dout))
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    ids = c[..., 3].view(np.int32)
    same = (ids[:, positions - length :, None] == ids[:, None, :]).astype(np.float64)[:, None]
    xyz = c[..., :3].astype(np.float64)
    difference = xyz[:, positions - length :, None] - xyz[:, None]
    planar = np.sqrt((difference[..., :2] ** 2).sum(axis=-1))[:, None]
    height = np.abs(difference[..., 2])[:, None]
    a, b, g = (weights[:, i].astype(np.float64)[None, :, None, None] for i in range(3))
    scores = scale * q @ k.swapaxes(2, 3) - a * planar - b * height + g * same
    if causal:
        scores[:, :, np.triu(np.ones((length, positions), bool), positions - length + 1)] = -np.inf
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    out = p @ v
    ds = p * (dout @ v.swapaxes(2, 3) - (dout * out).sum(axis=-1, keepdims=True))

    def by_kv(x: Any) -> Any:
        return x.reshape(x.shape[0], kv_heads, group, *x.shape[2:]).sum(axis=2).transpose(0, 2, 1, 3)

    return {
        "out": out.transpose(0, 2, 1, 3),
        "dq": (scale * ds @ k).transpose(0, 2, 1, 3),
        "dk": by_kv(scale * ds.swapaxes(2, 3) @ q),
        "dv": by_kv(p.swapaxes(2, 3) @ dout),
        "dterms": np.stack([(ds * x).sum(axis=(0, 2, 3)) for x in (-planar, -height, same)], axis=1),
    }


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@EITHER
def test_score_terms(
    device: Device, rng: Any, storage: str, sizes: tuple[int, ...], causal: bool, method: BackwardMethod
) -> None:
    batch, length, positions, heads, kv_heads, size = sizes
    shapes = [(batch, length, heads, size), *[(batch, positions, kv_heads, size)] * 2, (batch, length, heads, size)]
    q, k, v, dout = (rng.standard_normal(s).astype(np.float32).astype(DTYPES[storage]) for s in shapes)
    c, weights = _coordinates(rng, batch, positions), rng.random((heads, 3)).astype(np.float32)
    terms = CoordinateTerms(device.put(c), device.put(weights))
    inputs = [device.put(x) for x in (q, k, v)]
    out, lse = device.put(np.zeros_like(q)), device.put(np.zeros((batch, heads, length), np.float32))
    gradients, dterms = [device.put(np.zeros_like(x)) for x in (q, k, v)], device.put(np.ones((heads, 3), np.float32))
    options: dict[str, Any] = {"causal": causal, "scale": size**-0.5, "terms": terms}
    attention_forward(device.launcher, *inputs, out, lse, **options)
    attention_backward(
        device.launcher, device.put(dout), *inputs, out, lse, *gradients,
        dterms=dterms, accumulate_terms=True, method=method, **options,
    )  # fmt: skip
    want = _dense(q, k, v, dout, c, weights, causal=causal, scale=size**-0.5)
    got = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))
    # bf16: P and dS are rounded to 8 bits before their products, 2^-8 of numbers of order 1 (dv sums over queries)
    factor = 40.0 + positions if storage == "float32" else 2.0**15
    for name, array in got.items():
        close(name, device.get(array), want[name], storage=storage, factor=factor, least=1.0)
    # sums of T·S terms; in bf16 δ comes from the rounded output
    factor = 200.0 if storage == "float32" else 2.0**16
    close("dterms", device.get(dterms) - 1.0, want["dterms"], storage="float32", factor=factor, least=1.0)


@EITHER
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("gamma", [300.0, -300.0])
def test_a_term_that_all_scores_share_changes_nothing(
    device: Device, rng: Any, storage: str, gamma: float, method: BackwardMethod
) -> None:
    """Softmax is blind to it, though exp(±300) is not a float; places of a tile that hold no query stay out of it."""
    shape = (1, 70, 2, 64)
    q, k, v, dout = (device.put(rng.standard_normal(shape).astype(np.float32).astype(DTYPES[storage])) for _ in "qkvo")
    coordinates = _coordinates(rng, 1, 70)
    coordinates[..., 3] = 1.0  # one id for all
    results: list[list[Any]] = []
    for shared in (0.0, gamma):
        weights = device.put(np.array([[0.0, 0.0, shared]] * 2, np.float32))
        options: dict[str, Any] = {
            "causal": True,
            "scale": 0.125,
            "terms": CoordinateTerms(device.put(coordinates), weights),
        }
        out, dq, dk, dv = (device.put(np.full(shape, np.nan, q.dtype)) for _ in range(4))
        lse, dterms = (device.put(np.zeros(sizes, np.float32)) for sizes in ((1, 2, 70), (2, 3)))
        attention_forward(device.launcher, q, k, v, out, lse, **options)
        attention_backward(
            device.launcher, dout, q, k, v, out, lse, dq, dk, dv, dterms=dterms, method=method, **options
        )
        results.append([device.get(x).astype(np.float64) for x in (out, dq, dk, dv, lse - np.float32(shared))])
    # a score near 300 is known to 300·2^-24 and so is its lse; in bf16 weights may round to the other neighbour
    relative = 16.0 * 300.0 * 2.0**-24 if storage == "float32" else 2.0**-5
    for name, got, want in zip(("out", "dq", "dk", "dv", "lse"), results[1], results[0], strict=True):
        error = float(np.abs(got - want).max())
        assert error <= relative * np.abs(want).max(), f"{name}: {error:.3g}"


@EITHER
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_no_query_gives_zeros(device: Device, rng: Any, storage: str, method: BackwardMethod) -> None:
    """T = 0: keys that nobody sees, and no step that would write the terms' partial sums."""
    dtype = DTYPES[storage]
    q, k = (device.put(np.full((1, length, 2, 24), np.nan, dtype)) for length in (0, 5))
    out, dq, dk, dv = (device.put(np.full(x.shape, np.nan, dtype)) for x in (q, q, k, k))
    terms = CoordinateTerms(device.put(_coordinates(rng, 1, 5)), device.put(np.ones((2, 3), np.float32)))
    dterms, lse = device.put(np.full((2, 3), np.nan, np.float32)), device.put(np.zeros((1, 2, 0), np.float32))
    attention_backward(
        device.launcher, q, q, k, k, out, lse, dq, dk, dv, causal=True, scale=1.0, terms=terms, dterms=dterms,
        method=method,
    )  # fmt: skip
    for array in (dk, dv, dterms):
        assert not device.get(array).astype(np.float64).any()


def test_terms_of_the_wrong_shape_are_refused(device: Device) -> None:
    q = device.put(np.zeros((1, 4, 2, 32), np.float32))
    out, lse = device.put(np.zeros((1, 4, 2, 32), np.float32)), device.put(np.zeros((1, 2, 4), np.float32))
    terms = CoordinateTerms(device.put(np.zeros((1, 4, 4), np.float32)), device.put(np.zeros((3, 3), np.float32)))
    with pytest.raises(UserError, match=r"terms have shapes .* must be"):
        attention_forward(device.launcher, q, q, q, out, lse, causal=True, scale=1.0, terms=terms)
