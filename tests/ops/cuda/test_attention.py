"""Attention against the float64 reference: float32 by eps, bf16 by FlashAttention's rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.cuda.attention import (
    METHOD,
    METHODS,
    BackwardMethod,
    attention_backward,
    attention_forward,
    attention_weights,
)
from cllm_gpu.ops.cuda.kernel_source import source_directory
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.reference import attention as reference
from cllm_gpu.simulator import KernelError, settings
from cllm_gpu.utils.errors import UserError
from tests.ops.cuda.comparison import close
from tests.ops.cuda.devices import BFLOAT16, DTYPES, Device, simulator_device


@dataclass(frozen=True)
class Case:
    """One call: sizes, mask, and how q, k and v lie in memory."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    size: int
    causal: bool
    packed: bool = False  # views of one (B, T, H + 2K, D) array, as after the qkv product

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        heads = f"H{self.heads}K{self.kv_heads}"
        return f"B{self.batch}T{self.queries}S{self.keys}{heads}D{self.size}{mask}{'packed' * self.packed}"


CASES = [
    Case(1, 130, 150, 4, 2, 16, True),  # first what finds most: several tiles of each, grouped queries
    Case(1, 1, 1, 1, 1, 32, True),
    Case(2, 65, 65, 2, 2, 64, True, packed=True),
    Case(1, 130, 130, 4, 2, 64, True, packed=True),  # two tiles, grouped queries
    Case(1, 128, 128, 2, 1, 64, True),  # whole tiles of every size
    Case(1, 40, 48, 2, 1, 80, False),  # one whole tile of keys
    Case(2, 33, 70, 2, 2, 96, False),
    Case(1, 5, 131, 2, 1, 128, True),  # decoding with a cache: queries are the last positions
    Case(1, 1, 66, 3, 3, 64, True),
    Case(1, 140, 140, 1, 1, 128, True),
    Case(1, 48, 48, 2, 2, 8, True, packed=True),  # head sizes off the usual list; one whole tile of dQ's keys
    Case(1, 20, 40, 1, 1, 19, True),
    Case(1, 21, 35, 2, 1, 17, True),  # one column over whole groups of 4, 8 and 16
    Case(1, 35, 35, 2, 2, 18, True, packed=True),  # even, yet no whole groups of 4 or 8
    Case(1, 70, 3, 2, 2, 32, False),
]


FUSED_KERNEL = ("attention_fused.cu", "attention_backward_fused")
EITHER = pytest.mark.parametrize("method", METHODS, ids=lambda method: {"fused": "in-one"}.get(method, method))


class Problem:
    """Operands of a case on the device and in float64."""

    def __init__(self, device: Device, rng: np.random.Generator, case: Case, storage: str) -> None:
        dtype = DTYPES[storage]
        b, t, s, h, kv, d = case.batch, case.queries, case.keys, case.heads, case.kv_heads, case.size

        def draw(*shape: int) -> Any:
            return rng.standard_normal(shape).astype(np.float32).astype(dtype)

        self.case, self.storage, self.dtype = case, storage, dtype
        self.scale = 1.0 / np.sqrt(d)
        self.host_dout = draw(b, t, h, d)
        if case.packed:
            whole = draw(b, t, h + 2 * kv, d)
            self.host = (whole[:, :, :h], whole[:, :, h : h + kv], whole[:, :, h + kv :])
            self.inputs, self.gradients = _split(device.put(whole), h, kv), None
            self.gradients = _split(device.put(np.full_like(whole, np.nan)), h, kv)
        else:
            self.host = (draw(b, t, h, d), draw(b, s, kv, d), draw(b, s, kv, d))
            self.inputs = tuple(device.put(x) for x in self.host)
            self.gradients = tuple(device.put(np.full_like(x, np.nan)) for x in self.host)
        self.dout = device.put(self.host_dout)
        self.out = device.put(np.full((b, t, h, d), np.nan, dtype))
        self.lse = device.put(np.full((b, h, t), np.nan, np.float32))
        self.options: dict[str, Any] = {"causal": case.causal, "scale": self.scale}

    def run(
        self, device: Device, method: BackwardMethod = METHOD
    ) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
        """out, dq, dk, dv as float64, and lse."""
        attention_forward(device.launcher, *self.inputs, self.out, self.lse, **self.options)
        self.backward(device, method)
        arrays = (self.out, *self.gradients)
        return [device.get(x).astype(np.float64) for x in arrays], device.get(self.lse)

    def backward(self, device: Device, method: BackwardMethod) -> list[bytes]:
        """The gradients alone, over not-a-numbers; the bits of dq, dk, dv."""
        for array in self.gradients:
            array[...] = device.put(np.full((), np.nan, self.dtype))
        saved = (self.out, self.lse)
        attention_backward(
            device.launcher, self.dout, *self.inputs, *saved, *self.gradients, method=method, **self.options
        )
        return [device.get(x).tobytes() for x in self.gradients]

    def reference(self) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
        """The same in float64."""
        inputs = [x.astype(np.float64) for x in self.host]
        out, lse = np.zeros(self.host_dout.shape), np.zeros(self.lse.shape)
        reference.attention_forward(np, *inputs, out, lse, **self.options)
        gradients = [np.zeros_like(x) for x in inputs]
        dout = self.host_dout.astype(np.float64)
        reference.attention_backward(np, dout, *inputs, out, lse, *gradients, **self.options)
        return [out, *gradients], lse


def _split(whole: Any, heads: int, kv_heads: int) -> tuple[Any, Any, Any]:
    return whole[:, :, :heads], whole[:, :, heads : heads + kv_heads], whole[:, :, heads + kv_heads :]


def _rounded(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x.astype(np.float32).astype(BFLOAT16).astype(np.float64)


def plain_bf16(problem: Problem) -> list[np.ndarray[Any, Any]]:
    """out, dq, dk, dv of the unfused computation with every array rounded to bf16: FlashAttention's yardstick."""
    case = problem.case
    group = case.heads // case.kv_heads
    q = problem.host[0].astype(np.float64).transpose(0, 2, 1, 3)
    k, v = (np.repeat(x.astype(np.float64).transpose(0, 2, 1, 3), group, axis=1) for x in problem.host[1:])
    dout = problem.host_dout.astype(np.float64).transpose(0, 2, 1, 3)
    scores = _rounded(_rounded(q @ k.swapaxes(2, 3)) * problem.scale)
    if case.causal:
        hidden = np.triu(np.ones((case.queries, case.keys), bool), case.keys - case.queries + 1)
        scores[:, :, hidden] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = _rounded(weights / weights.sum(axis=-1, keepdims=True))
    out = _rounded(weights @ v)
    dv = _rounded(weights.swapaxes(2, 3) @ dout)
    dweights = _rounded(dout @ v.swapaxes(2, 3))
    delta = (weights * dweights).sum(axis=-1, keepdims=True)
    dscores = _rounded(_rounded(weights * (dweights - delta)) * problem.scale)
    dq, dk = _rounded(dscores @ k), _rounded(dscores.swapaxes(2, 3) @ q)
    dk, dv = (_rounded(x.reshape(case.batch, case.kv_heads, group, *x.shape[2:]).sum(axis=2)) for x in (dk, dv))
    return [x.transpose(0, 2, 1, 3) for x in (out, dq, dk, dv)]


def check_float32(device: Device, rng: Any, case: Case, methods: Sequence[BackwardMethod]) -> None:
    """By eps: sums over keys or queries; an exponent is off by a few eps; dP − δ cancels numbers of order 1."""
    problem = Problem(device, rng, case, "float32")
    want, want_lse = problem.reference()
    for method in methods:
        got, lse = problem.run(device, method)
        for name, ours, theirs in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            close(f"{name}, {method}", ours, theirs, storage="float32", factor=40 + case.keys, least=1.0)
        close("lse", lse, want_lse, storage="float32", factor=20)


def check_bfloat16(device: Device, rng: Any, case: Case, methods: Sequence[BackwardMethod]) -> None:
    """|ours − exact| ≤ k·|plain bf16 − exact| + two roundings: k = 2 for the output, 3 for the gradients."""
    problem = Problem(device, rng, case, "bfloat16")
    want, want_lse = problem.reference()
    plain = plain_bf16(problem)
    for method in methods:
        got, lse = problem.run(device, method)
        close("lse", lse, want_lse, storage="float32", factor=40)
        for name, ours, theirs, rough in zip(("out", "dq", "dk", "dv"), got, want, plain, strict=True):
            rounding = 2.0 * np.abs(_rounded(theirs + 0.3 - 0.3) - theirs).max()
            bound = (2.0 if name == "out" else 3.0) * np.abs(rough - theirs).max() + rounding
            error = np.abs(ours - theirs).max()
            print(f"{name}, {method}: error {error:.3g}, bound {bound:.3g}")
            assert error <= bound, f"{name}, {method}: error {error:.3g} passes {bound:.3g}"


@EITHER
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_in_float32(device: Device, rng: Any, case: Case, method: BackwardMethod) -> None:
    check_float32(device, rng, case, [method])


@EITHER
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_in_bfloat16(device: Device, rng: Any, case: Case, method: BackwardMethod) -> None:
    check_bfloat16(device, rng, case, [method])


def test_attention_weights(device: Device, rng: Any) -> None:
    q, k = (rng.standard_normal((1, n, 2, 16)).astype(np.float32) for n in (3, 5))
    got = device.get(attention_weights(device.launcher, device.put(q), device.put(k), causal=True, scale=0.25))
    want = reference.attention_weights(np, q.astype(np.float64), k.astype(np.float64), causal=True, scale=0.25)
    close("weights", got, want, storage="float32", factor=20)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_a_query_over_65536_positions(device: Device, rng: Any, storage: str) -> None:
    """The longest context: one tile of queries decodes over all of it."""
    positions, size = 65536, 32
    q = rng.standard_normal((1, 2, 1, size)).astype(np.float32).astype(DTYPES[storage])
    k, v = (rng.standard_normal((1, positions, 1, size)).astype(np.float32).astype(DTYPES[storage]) for _ in "kv")
    out, lse = device.put(np.zeros_like(q)), device.put(np.zeros((1, 1, 2), np.float32))
    attention_forward(device.launcher, *map(device.put, (q, k, v)), out, lse, causal=True, scale=0.5)
    want, want_lse = np.zeros(q.shape), np.zeros((1, 1, 2))
    inputs = [x.astype(np.float64) for x in (q, k, v)]
    reference.attention_forward(np, *inputs, want, want_lse, causal=True, scale=0.5)
    # 65,536 weights are added up tile by tile: errors of √(number of tiles)·eps, and bf16 rounds each weight to 2^-9
    close("out", device.get(out), want, storage=storage, factor=300 if storage == "float32" else 2.0**13, least=1.0)
    close("lse", device.get(lse), want_lse, storage="float32", factor=100)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_strides_beyond_32_bits(storage: str) -> None:
    """Batch items that lie more than 2^31 elements apart: every product of sizes is made in 64 bits."""
    device = simulator_device()
    dtype = DTYPES[storage]
    rng, stride, shape = np.random.default_rng(2), 2**31 + 64, (2, 5, 1, 32)
    memory = np.zeros(stride + 5 * 32, dtype)  # pages are taken only where something is written
    views = []
    for _ in "qkv":
        view = np.lib.stride_tricks.as_strided(
            memory, shape, tuple(n * dtype.itemsize for n in (stride, 32, 32, 1)), writeable=True
        )
        view[...] = rng.standard_normal(shape).astype(np.float32).astype(dtype)
        views.append(np.ascontiguousarray(view))
    out, lse = np.zeros(shape, dtype), np.zeros((2, 1, 5), np.float32)
    attention_forward(device.launcher, view, *views[:2], out, lse, causal=True, scale=0.3)
    want, want_lse = np.zeros_like(out), np.zeros_like(lse)
    attention_forward(device.launcher, views[2], *views[:2], want, want_lse, causal=True, scale=0.3)
    assert np.array_equal(out.view(np.uint8), want.view(np.uint8))
    assert np.array_equal(lse, want_lse)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case", [Case(2, 300, 300, 2, 1, 64, True, packed=True), Case(1, 70, 300, 1, 1, 64, False)], ids=str
)
def test_the_fused_backward_leaves_its_counters_at_zero(device: Device, rng: Any, case: Case, storage: str) -> None:
    """So the next call finds its turns: the same bits at every call, whatever calls of other sizes lie between."""
    problem = Problem(device, rng, case, storage)
    problem.run(device)
    first = problem.backward(device, "fused")
    count = 1 + case.batch * case.heads * case.queries
    assert not device.get(device.launcher.counters(count)).any()
    other = Problem(device, rng, Case(1, 130, 130, 1, 1, 64, True), storage)
    other.run(device, "fused")
    assert problem.backward(device, "fused") == first


def test_counters_of_a_launch_that_ended_midway_are_forgotten() -> None:
    """On the simulator; on a GPU a kernel that dies takes its context along."""
    device = simulator_device()
    problem = Problem(device, np.random.default_rng(3), Case(1, 130, 130, 1, 1, 64, True), "bfloat16")
    problem.run(device)
    first = problem.backward(device, "fused")
    counters = device.launcher.counters(2)
    counters[1] = 7  # as a kernel that was stopped would leave it
    with pytest.raises(KernelError, match="waits for another block, which has not run, to write") as caught:
        problem.backward(device, "fused")
    assert caught.value.kind == "waiting"
    assert problem.backward(device, "fused") == first


def test_a_method_that_is_none_is_refused(device: Device, rng: Any) -> None:
    problem = Problem(device, rng, Case(1, 2, 2, 1, 1, 8, True), "float32")
    method: Any = "quick"
    with pytest.raises(UserError, match="argument method is 'quick'; it must be two kernels or fused"):
        problem.run(device, method)


def _traffic(device: Device, source: str, kernel: str) -> Any:
    variant = Variant(source, "bfloat16", defines=(("HEAD_SIZE", 128),))
    return device.launcher.kernel(variant, kernel).last_traffic


def test_matrix_loads_have_no_bank_conflicts() -> None:
    """The swizzle: every ldmatrix of the forward and the backward kernels takes as few passes as its bytes need.

    So do the stores of dS in the fused kernel, and its running sums of dQ take whole sectors of memory.
    """
    device = simulator_device()
    problem = Problem(device, np.random.default_rng(1), Case(1, 130, 130, 1, 1, 128, True), "bfloat16")
    with settings(check=True, count_traffic=True):
        problem.run(device)
        problem.backward(device, "fused")
    wrappers = (source_directory() / "common.cuh").read_text(encoding="utf-8").splitlines()
    loads = {i for i, text in enumerate(wrappers, 1) if "sim::load_matrix" in text}
    two_kernels = ("attention_forward", "attention_backward_keys", "attention_backward_queries")
    for source, name in [*(("attention.cu", name) for name in two_kernels), FUSED_KERNEL]:
        lines = [x for x in _traffic(device, source, name).lines if x.place.file == "common.cuh"]
        lines = [x for x in lines if x.place.line in loads and x.shared]
        assert len(lines) == 2  # plain and transposed
        assert sum(line.instructions for line in lines) > 1000
        assert [line.conflicts for line in lines] == [0, 0], name
    own = [x for x in _traffic(device, *FUSED_KERNEL).lines if x.place.file == "attention_fused_bfloat16.cuh"]
    assert {x.shared for x in own} == {True, False}
    assert all(x.passes == x.ideal and x.instructions > 10 for x in own), own
