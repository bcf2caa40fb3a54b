"""The lattice's score terms in the attention kernels, against the reference in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from cllm_gpu.model.lattice import lattice_points
from cllm_gpu.ops.cuda.attention import BackwardMethod, attention_backward, attention_forward
from cllm_gpu.ops.reference import attention as reference
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients
from cllm_gpu.utils.errors import UserError
from tests.ops.cuda.comparison import close
from tests.ops.cuda.devices import DTYPES, Device
from tests.ops.cuda.test_attention import EITHER

Choice = tuple[bool, bool, bool, int]  # distance, prime distance, same token, matches
USUAL: Choice = (False, False, True, 8)
ALL: Choice = (True, True, True, 8)
# B, T, S, H, K, D
SIZES = [(2, 70, 70, 2, 2, 64), (1, 40, 127, 4, 2, 24), (1, 64, 64, 2, 1, 128)]


def repetitive(rng: Any, batch: int, positions: int) -> np.ndarray[Any, Any]:
    """Tokens (B, S) of 0 … 12 with matches of every length: a phrase again and again, some of its tokens changed."""
    tokens = np.tile(rng.integers(0, 13, (batch, 11)), positions // 11 + 1)[:, :positions].astype(np.int32)
    changed = rng.random(tokens.shape) < 0.15
    tokens[changed] = rng.integers(0, 13, int(changed.sum()))
    return tokens


def make_score_bias(rng: Any, choice: Choice, batch: int, positions: int, heads: int, storage: str) -> ScoreBias:
    """Terms over repetitive tokens with scalars that matter, in NumPy."""
    distance, prime_distance, same_token, matches = choice
    tokens = repetitive(rng, batch, positions)
    points = lattice_points(13)[tokens].astype(np.float32) if distance or prime_distance else None
    count = distance + prime_distance + same_token + matches
    scalars = rng.standard_normal((heads, count)).astype(np.float32).astype(DTYPES[storage])
    return ScoreBias(tokens, points, scalars, distance, prime_distance, same_token, matches)


def on_device(device: Device, score_bias: ScoreBias) -> ScoreBias:
    points = None if score_bias.points is None else device.put(score_bias.points)
    arrays = {"tokens": device.put(score_bias.tokens), "points": points, "scalars": device.put(score_bias.scalars)}
    return dataclasses.replace(score_bias, **arrays)


def wide(score_bias: ScoreBias) -> ScoreBias:
    """The same in float64."""
    points = None if score_bias.points is None else score_bias.points.astype(np.float64)
    return dataclasses.replace(score_bias, points=points, scalars=score_bias.scalars.astype(np.float64))


class Problem:
    """Operands of one call and its results, on a device and in float64."""

    def __init__(self, rng: Any, sizes: tuple[int, ...], choice: Choice, storage: str, *, causal: bool) -> None:
        batch, length, positions, heads, kv_heads, size = sizes
        of_queries, of_keys = (batch, length, heads, size), (batch, positions, kv_heads, size)
        shapes = (of_queries, of_queries, of_keys, of_keys)
        self.inputs = [rng.standard_normal(s).astype(np.float32).astype(DTYPES[storage]) for s in shapes]
        self.score_bias = make_score_bias(rng, choice, batch, positions, heads, storage)
        self.options: dict[str, Any] = {"causal": causal, "scale": size**-0.5}
        self.lse_shape = (batch, heads, length)

    def fused(self, device: Device, method: BackwardMethod | None, *, points: bool) -> dict[str, Any]:
        """Results of the kernels; the terms' gradients are added to ones."""
        dout, q, k, v = (device.put(x) for x in self.inputs)
        score_bias = on_device(device, self.score_bias)
        out, dq, dk, dv = (device.put(np.full(x.shape, np.nan, x.dtype)) for x in (q, q, k, v))
        lse = device.put(np.full(self.lse_shape, np.nan, np.float32))
        dscalars = device.put(np.ones_like(self.score_bias.scalars))
        dpoints = device.put(np.ones_like(self.score_bias.points)) if points else None
        attention_forward(device.launcher, q, k, v, out, lse, **self.options, score_bias=score_bias)
        attention_backward(
            device.launcher, dout, q, k, v, out, lse, dq, dk, dv, **self.options, score_bias=score_bias,
            dscore_bias=ScoreBiasGradients(dscalars, dpoints), method=method,
        )  # fmt: skip
        found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dscalars": dscalars, "dpoints": dpoints}
        return {name: device.get(x) for name, x in found.items() if x is not None}

    def expected(self, *, points: bool) -> dict[str, Any]:
        dout, q, k, v = (x.astype(np.float64) for x in self.inputs)
        score_bias = wide(self.score_bias)
        out, lse = np.zeros_like(q), np.zeros(self.lse_shape)
        dq, dk, dv, dscalars = (np.zeros_like(x) for x in (q, k, v, score_bias.scalars))
        dpoints = np.zeros_like(score_bias.points) if points else None
        reference.attention_forward(np, q, k, v, out, lse, **self.options, score_bias=score_bias)
        reference.attention_backward(
            np, dout, q, k, v, out, lse, dq, dk, dv, **self.options, score_bias=score_bias,
            dscore_bias=ScoreBiasGradients(dscalars, dpoints),
        )  # fmt: skip
        found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dscalars": 1.0 + dscalars}
        return found | ({} if dpoints is None else {"dpoints": 1.0 + dpoints})


def compare(got: dict[str, Any], want: dict[str, Any], storage: str, positions: int) -> None:
    # bf16: P and dS are rounded to 8 bits before their products, 2^-8 of numbers of order 1 (dv sums over queries)
    factor = 40.0 + positions if storage == "float32" else 2.0**15
    for name in ("out", "dq", "dk", "dv"):
        close(name, got[name], want[name], storage=storage, factor=factor, least=1.0)
    close("lse", got["lse"], want["lse"], storage="float32", factor=40.0 + positions, least=1.0)
    # sums of T·S terms; in bf16 δ comes from the rounded output
    factor = 200.0 if storage == "float32" else 2.0**16
    close("dscalars", got["dscalars"], want["dscalars"], storage=storage, factor=factor, least=1.0)
    if "dpoints" in want:
        close("dpoints", got["dpoints"], want["dpoints"], storage="float32", factor=factor, least=1.0)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("sizes", "choice", "causal"),
    [(SIZES[0], USUAL, True), (SIZES[1], ALL, True), (SIZES[1], ALL, False), (SIZES[2], USUAL, True)],
    ids=["usual", "all", "all, full", "usual, wide"],
)
@EITHER
def test_score_terms(
    device: Device, rng: Any, storage: str, sizes: Any, choice: Choice, causal: bool, method: BackwardMethod
) -> None:
    problem = Problem(rng, sizes, choice, storage, causal=causal)
    compare(problem.fused(device, method, points=False), problem.expected(points=False), storage, sizes[2])


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_points(device: Device, rng: Any, storage: str, causal: bool) -> None:
    """Repeated tokens have one point: there the distances have no slope. Queries are the last 40 of 75 positions."""
    problem = Problem(rng, (2, 40, 75, 4, 2, 24), ALL, storage, causal=causal)
    compare(problem.fused(device, None, points=True), problem.expected(points=True), storage, 75)


@pytest.mark.parametrize(
    "choice",
    [(True, False, False, 0), (False, True, False, 0), (False, False, True, 0), *[(False,) * 3 + (n,) for n in (1, 3)]],
    ids=["distance", "prime distance", "same token", "match of 1", "matches to 3"],
)
def test_each_term_alone(device: Device, rng: Any, choice: Choice) -> None:
    sizes = (1, 35, 70, 2, 1, 16)
    problem = Problem(rng, sizes, choice, "float32", causal=True)
    compare(problem.fused(device, "two kernels", points=False), problem.expected(points=False), "float32", 70)


@EITHER
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_no_scalar_no_difference(device: Device, rng: Any, storage: str, method: BackwardMethod) -> None:
    """Scalars of 0 give the bits of attention without terms where both cut their work alike: float32."""
    problem = Problem(rng, SIZES[0], USUAL, storage, causal=True)
    problem.score_bias.scalars[...] = 0.0
    got = problem.fused(device, method, points=False)
    dout, q, k, v = (device.put(x) for x in problem.inputs)
    out, dq, dk, dv = (device.put(np.full(x.shape, np.nan, x.dtype)) for x in (q, q, k, v))
    lse = device.put(np.full(problem.lse_shape, np.nan, np.float32))
    attention_forward(device.launcher, q, k, v, out, lse, **problem.options)
    attention_backward(device.launcher, dout, q, k, v, out, lse, dq, dk, dv, **problem.options, method=method)
    for name, plain in (("out", out), ("lse", lse), ("dq", dq), ("dk", dk), ("dv", dv)):
        want = device.get(plain)
        if storage == "float32" and device.launcher.xp is np:
            assert np.array_equal(got[name], want), name
        else:  # other tiles; on a GPU the compiler joins other products and sums
            factor = 40.0 + 70.0 if storage == "float32" else 2.0**15
            close(name, got[name], want, storage=storage, factor=factor, least=1.0)


@EITHER
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_places_that_hold_no_query_weigh_nothing(
    device: Device, rng: Any, storage: str, method: BackwardMethod
) -> None:
    """The last tile has such places; with nothing subtracted their weights would be infinite, and zeros of dO NaN."""
    problem = Problem(rng, (1, 70, 70, 2, 2, 16), (True, False, False, 0), storage, causal=True)
    problem.score_bias.scalars[...] = -300.0
    for name, result in problem.fused(device, method, points=False).items():
        assert np.isfinite(result.astype(np.float64)).all(), name


@EITHER
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("gamma", [300.0, -300.0])
def test_a_term_that_all_scores_share_changes_nothing(
    device: Device, rng: Any, storage: str, gamma: float, method: BackwardMethod
) -> None:
    """Softmax is blind to it, though exp(±300) is not a float; places of a tile that hold no query stay out of it."""
    problem = Problem(rng, (1, 70, 70, 2, 2, 64), (False, False, True, 0), storage, causal=True)
    problem.score_bias.tokens[...] = 7  # one token for all
    problem.score_bias.scalars[...] = 0.0
    results = [problem.fused(device, method, points=False)]
    problem.score_bias.scalars[...] = gamma
    results.append(problem.fused(device, method, points=False))
    results[1]["lse"] -= np.float32(problem.score_bias.scalars[0, 0])
    # a score near 300 is known to 300·2^-24 and so is its lse; in bf16 weights may round to the other neighbour
    relative = 16.0 * 300.0 * 2.0**-24 if storage == "float32" else 2.0**-5
    for name in ("out", "dq", "dk", "dv", "lse"):
        got, want = (result[name].astype(np.float64) for result in (results[1], results[0]))
        error = float(np.abs(got - want).max())
        assert error <= relative * np.abs(want).max(), f"{name}: {error:.3g}"


@EITHER
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_no_query_gives_zeros(device: Device, rng: Any, storage: str, method: BackwardMethod) -> None:
    """T = 0: keys that nobody sees, and no step that would write the terms' partial sums."""
    got = Problem(rng, (1, 0, 5, 2, 2, 24), ALL, storage, causal=True).fused(device, method, points=False)
    assert not got["dk"].astype(np.float64).any()
    assert not got["dv"].astype(np.float64).any()
    assert (got["dscalars"].astype(np.float64) == 1.0).all()


@EITHER
def test_one_token_and_the_largest_vocabulary(device: Device, rng: Any, method: BackwardMethod) -> None:
    """T = 1, and token ids up to 2^20 − 1 beside their neighbours."""
    problem = Problem(rng, (1, 1, 1, 2, 2, 24), ALL, "float32", causal=True)
    compare(problem.fused(device, method, points=False), problem.expected(points=False), "float32", 1)
    problem = Problem(rng, (1, 20, 20, 2, 2, 24), ALL, "float32", causal=True)
    problem.score_bias.tokens[...] = 2**20 - 1 - problem.score_bias.tokens % 3
    compare(problem.fused(device, method, points=False), problem.expected(points=False), "float32", 20)


def test_tokens_and_points_may_be_views_of_a_cache(device: Device, rng: Any) -> None:
    problem = Problem(rng, (2, 3, 20, 2, 1, 24), ALL, "float32", causal=True)
    want = problem.fused(device, "two kernels", points=False)
    q, k, v = (device.put(x) for x in problem.inputs[1:])
    score_bias = problem.score_bias
    tokens, points = device.put(np.full((2, 64), -9, np.int32)), device.put(np.full((2, 64, 3), np.nan, np.float32))
    tokens[:, :20], points[:, :20] = device.put(score_bias.tokens), device.put(score_bias.points)
    viewed = ScoreBias(tokens[:, :20], points[:, :20], device.put(score_bias.scalars), *ALL)
    out, lse = device.put(np.zeros(q.shape, np.float32)), device.put(np.zeros(problem.lse_shape, np.float32))
    attention_forward(device.launcher, q, k, v, out, lse, **problem.options, score_bias=viewed)
    assert np.array_equal(device.get(out), want["out"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scalars": (2, 4)}, r"score_bias.scalars have shape \(2, 4\); the terms in use take \(2, 11\)"),
        ({"scalars": (3, 11)}, r"score_bias.scalars has shape \(3, 11\); it must be \(2, "),
        ({"tokens": (1, 5)}, r"score_bias.tokens has shape \(1, 5\); it must be \(1, 4\)"),
        ({"points": (1, 4, 2)}, "score_bias.points must have 3 coordinates"),
        ({"points": None}, "score_bias.points are missing; a distance needs them"),
        ({"matches": 9, "scalars": (2, 12)}, "score_bias.matches is 9; it must be 0 to 8"),
    ],
    ids=["count", "heads", "tokens", "coordinates", "no points", "order"],
)
def test_terms_that_do_not_fit_are_refused(device: Device, rng: Any, change: dict[str, Any], message: str) -> None:
    problem = Problem(rng, (1, 4, 4, 2, 2, 24), ALL, "float32", causal=True)
    values = {
        name: device.put(np.zeros(value, np.int32 if name == "tokens" else np.float32))
        if isinstance(value, tuple)
        else value
        for name, value in change.items()
    }
    problem.score_bias = dataclasses.replace(problem.score_bias, **values)
    q, k, v = (device.put(x) for x in problem.inputs[1:])
    out, lse = device.put(np.zeros(q.shape, np.float32)), device.put(np.zeros(problem.lse_shape, np.float32))
    with pytest.raises(UserError, match=message):
        attention_forward(device.launcher, q, k, v, out, lse, **problem.options, score_bias=problem.score_bias)


def test_a_backward_with_nowhere_to_put_the_terms_gradients_is_refused(device: Device, rng: Any) -> None:
    problem = Problem(rng, (1, 4, 4, 2, 2, 24), ALL, "float32", causal=True)
    with pytest.raises(UserError, match="gradients of lattice points take the method 'two kernels', not 'fused'"):
        problem.fused(device, "fused", points=True)
    dout, q, k, v = (device.put(x) for x in problem.inputs)
    lse = device.put(np.zeros(problem.lse_shape, np.float32))
    with pytest.raises(UserError, match="argument dscore_bias is missing"):
        attention_backward(
            device.launcher,
            dout,
            q,
            k,
            v,
            q,
            lse,
            dout,
            k,
            v,
            **problem.options,
            score_bias=on_device(device, problem.score_bias),
        )
