"""The lattice's symmetry in the attention kernels and the rotary embedding's, against the reference in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from cllm_gpu.model.lattice import symmetry_turns
from cllm_gpu.ops.cuda.attention import BackwardMethod, attention_backward, attention_forward, attention_weights
from cllm_gpu.ops.cuda.rotary import rotary_backward, rotary_forward
from cllm_gpu.ops.reference import attention as reference
from cllm_gpu.ops.reference import rotary as reference_rotary
from cllm_gpu.ops.reference.score_bias import ScoreBiasGradients
from cllm_gpu.ops.reference.symmetry import ELEMENTS, Symmetry, symmetry_forward
from cllm_gpu.utils.errors import UserError
from tests.ops.cuda.comparison import close
from tests.ops.cuda.devices import DTYPES, Device
from tests.ops.cuda.test_attention import EITHER
from tests.ops.cuda.test_score_bias import USUAL, compare, make_score_bias, on_device, wide

Array = np.ndarray[Any, Any]
STORAGES = pytest.mark.parametrize("storage", ["float32", "bfloat16"])
# B, T, S, H, K, D, pairs, causal, and whether q, k and v are views of one array, as after the qkv product
CASES = {
    "a quarter, cached": (2, 40, 70, 2, 1, 64, 8, True, False),
    "all dimensions": (1, 70, 70, 2, 2, 24, 12, True, True),
    "one pair, odd size": (1, 20, 40, 1, 1, 19, 1, False, False),
    "one token": (2, 1, 66, 2, 1, 64, 8, True, False),
    "rows that warps share": (1, 40, 40, 2, 1, 80, 13, True, True),
    "large heads": (1, 66, 66, 1, 1, 128, 64, True, False),
}


def every_element(rng: Any, batch: int, positions: int) -> Array:
    """Tokens (B, S), all 24 elements among any 24 neighbours, far from 0 and far apart."""
    start = np.arange(batch * positions).reshape(batch, positions) * 1009
    return (start + ELEMENTS * rng.integers(0, 2000, start.shape)).astype(np.int32)


class Problem:
    """Operands of one call and its results, on a device and in float64."""

    def __init__(self, rng: Any, case: tuple[Any, ...], storage: str, *, with_score_bias: bool = False) -> None:
        batch, length, positions, heads, kv_heads, size, pairs, causal, packed = case
        dtype = DTYPES[storage]

        def draw(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(np.float32).astype(dtype)

        self.dout = draw(batch, length, heads, size)
        if packed:
            whole = draw(batch, length, heads + 2 * kv_heads, size)
            self.inputs = [whole[:, :, :heads], whole[:, :, heads : heads + kv_heads], whole[:, :, heads + kv_heads :]]
        else:
            self.inputs = [draw(batch, length, heads, size), *(draw(batch, positions, kv_heads, size) for _ in "kv")]
        self.score_bias = make_score_bias(rng, USUAL, batch, positions, heads, storage) if with_score_bias else None
        tokens = every_element(rng, batch, positions) if self.score_bias is None else self.score_bias.tokens
        self.symmetry = Symmetry(tokens, symmetry_turns(pairs))
        self.options: dict[str, Any] = {"causal": causal, "scale": size**-0.5}
        self.lse_shape, self.positions = (batch, heads, length), positions

    def on(self, device: Device) -> dict[str, Any]:
        """Options of a call on the device, terms and symmetry of one array of tokens."""
        score_bias = None if self.score_bias is None else on_device(device, self.score_bias)
        tokens = device.put(self.symmetry.tokens) if score_bias is None else score_bias.tokens
        turns = device.put(self.symmetry.turns.astype(np.float32))
        return self.options | {"score_bias": score_bias, "symmetry": Symmetry(tokens, turns)}

    def fused(self, device: Device, method: BackwardMethod) -> dict[str, Array]:
        """Results of the kernels; the terms' gradients are added to ones."""
        options = self.on(device)
        dout, q, k, v = self.dout, *(device.put(x) for x in self.inputs)
        out, dq, dk, dv = (device.put(np.full(x.shape, np.nan, x.dtype)) for x in (q, q, k, v))
        lse = device.put(np.full(self.lse_shape, np.nan, np.float32))
        found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        dscore_bias = None
        if self.score_bias is not None:
            found["dscalars"] = device.put(np.ones_like(self.score_bias.scalars))
            dscore_bias = ScoreBiasGradients(found["dscalars"], None)
        attention_forward(device.launcher, q, k, v, out, lse, **options)
        attention_backward(
            device.launcher,
            device.put(dout),
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            **options,
            dscore_bias=dscore_bias,
            method=method,
        )
        for before, after in zip(self.inputs, (q, k, v), strict=True):
            assert np.array_equal(device.get(after), before), "what is read is left as it was"
        return {name: device.get(x) for name, x in found.items()}

    def expected(self) -> dict[str, Array]:
        """The same in float64."""
        score_bias = None if self.score_bias is None else wide(self.score_bias)
        dout, q, k, v = (x.astype(np.float64) for x in (self.dout, *self.inputs))
        out, lse, dq, dk, dv = (np.zeros(s) for s in (q.shape, self.lse_shape, q.shape, k.shape, v.shape))
        found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        dscore_bias = None
        if score_bias is not None:
            found["dscalars"] = np.ones_like(score_bias.scalars)
            dscore_bias = ScoreBiasGradients(found["dscalars"], None)
        options = self.options | {"score_bias": score_bias, "symmetry": self.symmetry}
        reference.attention_forward(np, q, k, v, out, lse, **options)
        reference.attention_backward(np, dout, q, k, v, out, lse, dq, dk, dv, **options, dscore_bias=dscore_bias)
        return found


@STORAGES
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@EITHER
def test_symmetry_alone(device: Device, rng: Any, case: Any, storage: str, method: BackwardMethod) -> None:
    problem = Problem(rng, case, storage)
    got, want = problem.fused(device, method), problem.expected()
    # S q and S k are rounded to bf16, 2^-9 of each on average: that moves a score of order 1 by a few 2^-9
    factor = 40.0 + problem.positions if storage == "float32" else 2.0**15
    for name in ("out", "dq", "dk", "dv", "lse"):
        kind = "float32" if name == "lse" else storage
        close(name, got[name], want[name], storage=kind, factor=factor, least=1.0)


@STORAGES
@EITHER
def test_symmetry_with_score_terms(device: Device, rng: Any, storage: str, method: BackwardMethod) -> None:
    """One array of tokens for both; the scalars' gradients see the turned queries and keys."""
    problem = Problem(rng, CASES["a quarter, cached"], storage, with_score_bias=True)
    got, want = problem.fused(device, method), problem.expected()
    if storage == "bfloat16":  # lse, too, of products of what was rounded once more
        close("lse", got["lse"], want["lse"], storage="float32", factor=2.0**15, least=1.0)
        got["lse"], want["lse"] = np.zeros(1), np.zeros(1)
    compare(got, want, storage, problem.positions)


@STORAGES
@pytest.mark.parametrize("case", ["a quarter, cached", "rows that warps share", "one pair, odd size"])
def test_the_kernel_sees_what_a_pass_before_it_would_leave(device: Device, rng: Any, storage: str, case: str) -> None:
    """Turned by the reference and rounded once, the same queries and keys give the same output without a symmetry."""
    problem = Problem(rng, CASES[case], storage)
    got = problem.fused(device, "two kernels")
    out, lse = got["out"], got["lse"]
    symmetry = dataclasses.replace(problem.symmetry, turns=problem.symmetry.turns.astype(np.float32))
    for x in problem.inputs[:2]:
        turned = x.astype(np.float32)
        symmetry_forward(np, turned, symmetry)
        x[...] = turned.astype(x.dtype)
    plain, plain_lse = device.put(np.zeros(out.shape, out.dtype)), device.put(np.zeros(lse.shape, np.float32))
    inputs = [device.put(x) for x in problem.inputs]
    attention_forward(device.launcher, *inputs, plain, plain_lse, **problem.options)
    if device.launcher.xp is np:
        assert np.array_equal(device.get(plain), out)
        assert np.array_equal(device.get(plain_lse), lse)
    else:  # a GPU's compiler joins other products and sums
        close("out", out, device.get(plain), storage=storage, factor=110.0 if storage == "float32" else 2.0**15)


@EITHER
@STORAGES
def test_equal_tokens_of_a_rotation_change_nothing(
    device: Device, rng: Any, storage: str, method: BackwardMethod
) -> None:
    """S is orthogonal: one element for all positions leaves every product, so out and dv, and dq and dk turned back."""
    problem = Problem(rng, CASES["all dimensions"], storage)
    problem.symmetry.tokens[...] = 7 + 5 * ELEMENTS
    got = problem.fused(device, method)
    problem.symmetry.tokens[...] = 0
    want = problem.fused(device, method)
    for name in ("out", "dq", "dk", "dv"):
        error = np.abs(got[name].astype(np.float64) - want[name].astype(np.float64)).max()
        assert error <= (2.0**-17 if storage == "float32" else 2.0**-4), name


def test_attention_weights(device: Device, rng: Any) -> None:
    problem = Problem(rng, CASES["one pair, odd size"], "float32")
    q, k = problem.inputs[:2]
    got = device.get(attention_weights(device.launcher, device.put(q), device.put(k), **problem.on(device)))
    options = problem.options | {"symmetry": problem.symmetry}
    want = reference.attention_weights(np, q.astype(np.float64), k.astype(np.float64), **options)
    close("weights", got, want, storage="float32", factor=20)


@STORAGES
@pytest.mark.parametrize(("length", "heads", "size", "pairs"), [(13, 3, 16, 3), (26, 2, 10, 5), (2, 5, 64, 32)])
def test_rotary_with_symmetry(
    device: Device, rng: Any, storage: str, length: int, heads: int, size: int, pairs: int
) -> None:
    """On a strided view, after cached positions; a pair across the middle of a head; S first, its inverse last."""
    whole = rng.standard_normal((2, length, heads + 3, size)).astype(np.float32).astype(DTYPES[storage])
    tokens, turns = every_element(rng, 2, length + 4), symmetry_turns(pairs)
    symmetry = Symmetry(device.put(tokens), device.put(turns.astype(np.float32)))
    tables = reference_rotary.rotary_tables(np, length, size, np.float64)
    narrow = [device.put(table.astype(np.float32)) for table in tables]
    for ours, theirs in (
        (rotary_forward, reference_rotary.rotary_forward),
        (rotary_backward, reference_rotary.rotary_backward),
    ):
        memory, want = device.put(whole), whole.astype(np.float64)
        ours(device.launcher, memory[:, :, 2:-1], *narrow, symmetry=symmetry)
        theirs(np, want[:, :, 2:-1], *tables, symmetry=Symmetry(tokens, turns))
        close(ours.__name__, device.get(memory), want, storage=storage, factor=8)
        for part in (np.s_[:, :, :2], np.s_[:, :, -1:]):
            assert np.array_equal(device.get(memory)[part], whole[part])


def _i(*shape: int) -> Array:
    return np.zeros(shape, np.int32)


def _f(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("tokens", "turns", "message"),
    [
        (_i(1, 3), _f(24, 2, 2), r"symmetry.tokens has shape \(1, 3\); it must be \(1, 4\)"),
        (_i(1, 4), _f(12, 2, 2), r"symmetry.turns has shape \(12, 2, 2\); it must be \(24, "),
        (_i(1, 4), _f(24, 2, 3), "symmetry.turns must hold a cosine and a sine a pair"),
        (_i(1, 4), _f(24, 5, 2), "argument symmetry has 5 pairs; a head of 8 dimensions takes 1 to 4"),
        (_i(1, 4), _f(24, 0, 2), "argument symmetry has 0 pairs"),
    ],
    ids=["tokens", "elements", "parts", "too many", "none"],
)
def test_a_symmetry_that_does_not_fit_is_refused(device: Device, tokens: Any, turns: Any, message: str) -> None:
    symmetry = Symmetry(device.put(tokens), device.put(turns))
    q, k, lse = device.put(_f(1, 4, 2, 8)), device.put(_f(1, 4, 1, 8)), device.put(_f(1, 2, 4))
    with pytest.raises(UserError, match=message):
        attention_forward(device.launcher, q, k, k, q, lse, causal=True, scale=1.0, symmetry=symmetry)


def test_a_rotation_with_too_few_tokens_is_refused(device: Device) -> None:
    q, turns = device.put(_f(1, 4, 1, 8)), device.put(_f(24, 2, 2))
    table, few = device.put(_f(4, 4)), Symmetry(device.put(_i(1, 3)), turns)
    with pytest.raises(UserError, match="the symmetry of 3 tokens on 4 positions of head size 8; it takes as many"):
        rotary_forward(device.launcher, q, table, table, symmetry=few)
