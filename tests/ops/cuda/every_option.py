"""One call of every kernel at small odd sizes: what the schedule and determinism tests repeat."""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm_gpu.model.lattice import symmetry_turns
from cllm_gpu.ops.cuda.adam import adam_step_on_device
from cllm_gpu.ops.cuda.attention import METHODS, attention_backward, attention_forward
from cllm_gpu.ops.cuda.column_sum import column_sum
from cllm_gpu.ops.cuda.cross_entropy import cross_entropy
from cllm_gpu.ops.cuda.embedding import embedding_backward, embedding_forward
from cllm_gpu.ops.cuda.gelu import gelu_backward, gelu_forward
from cllm_gpu.ops.cuda.layernorm import layernorm_backward, layernorm_forward, residual_layernorm_forward
from cllm_gpu.ops.cuda.rotary import rotary_backward, rotary_forward
from cllm_gpu.ops.cuda.sgd import sgd_step
from cllm_gpu.ops.cuda.squared_norm import squared_norm_on_device
from cllm_gpu.ops.cuda.step_decision import add_losses, decide_step
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.ops.reference.rotary import rotary_tables
from cllm_gpu.ops.reference.rounding import StochasticRounding
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients
from cllm_gpu.ops.reference.symmetry import Symmetry
from tests.ops.cuda.devices import BFLOAT16, DTYPES, Device

Results = dict[str, np.ndarray[Any, Any]]


class _Maker:
    """Arrays of one storage dtype on a device, the same at every call of `run_everything`."""

    def __init__(self, device: Device, storage: str) -> None:
        self.device, self.dtype, self.rng = device, DTYPES[storage], np.random.default_rng(8)

    def draw(self, *shape: int, dtype: Any = None) -> Any:
        values = self.rng.standard_normal(shape).astype(np.float32)
        return self.device.put(values.astype(self.dtype if dtype is None else dtype))

    def integers(self, high: int, *shape: int) -> Any:
        return self.device.put(self.rng.integers(0, high, shape).astype(np.int32))

    def collect(self, results: Results, prefix: str, **arrays: Any) -> None:
        results.update({f"{prefix}.{name}": self.device.get(x).copy() for name, x in arrays.items()})


def run_everything(device: Device, storage: str) -> Results:
    """Results of every operation by name; always from the same inputs."""
    make, results = _Maker(device, storage), Results()
    for columns in (40, 1100):  # a warp for a row, a block for a row
        _rowwise(make, results, f"rows{columns}", columns)
    _flat(make, results)
    _sequence(make, results)
    for queries, keys, heads, size in ((70, 70, 2, 64), (35, 131, 2, 24)):
        _attention(make, results, f"attention{size}", queries, keys, heads, size)
    for queries, keys, size in ((40, 70, 64), (20, 24, 40)):  # rows of a warp's own, and rows that warps share
        _turned_attention(make, results, f"turned{size}", queries, keys, size)
    return results


def _rowwise(make: _Maker, results: Results, prefix: str, columns: int) -> None:
    launcher, rows = make.device.launcher, 11
    x, branch, dout, out, dx = (make.draw(rows, columns) for _ in range(5))
    weight, bias, dweight, dbias = (make.draw(columns) for _ in range(4))
    mean, rstd, losses = (make.draw(rows, dtype=np.float32) for _ in range(3))
    layernorm_forward(launcher, x, weight, bias, out, mean, rstd, epsilon=1e-5)
    make.collect(results, f"{prefix}.layernorm", out=out, mean=mean, rstd=rstd)
    dropout = Dropout(0.25, seed=3, step=2, site=1, first_element=5)
    residual_layernorm_forward(launcher, x, branch, weight, bias, x, out, mean, rstd, epsilon=1e-5, dropout=dropout)
    dbranch = make.draw(rows, columns)
    layernorm_backward(
        launcher, dout, x, weight, mean, rstd, dx, dx, dbranch, dweight, dbias, accumulate=False, dropout=dropout
    )
    make.collect(results, f"{prefix}.residual", x=x, out=out)
    make.collect(results, f"{prefix}.layernorm_backward", dx=dx, dbranch=dbranch, dweight=dweight, dbias=dbias)
    gelu_forward(launcher, x, bias, out)
    gelu_backward(launcher, dout, x, dout, dbias, accumulate=True)
    make.collect(results, f"{prefix}.gelu", x=x, out=out, dx=dout, dbias=dbias)
    column_sum(launcher, branch, dbias, accumulate=False)
    cross_entropy(launcher, branch, make.integers(columns, rows), losses, ignore_index=-1, gradient_scale=0.5)
    make.collect(results, f"{prefix}.cross_entropy", dx=branch, losses=losses, sums=dbias)


def _flat(make: _Maker, results: Results) -> None:
    launcher, size = make.device.launcher, 2571
    p, m, v = (make.draw(size, dtype=np.float32) for _ in range(3))
    g, copy = make.draw(size), make.draw(size)
    v *= v
    skip, clip = make.integers(1, 1), make.draw(1, dtype=np.float32)
    sums, rate, outcome = (make.draw(n, dtype=np.float64) for n in (2, 1, 1))
    state = [make.integers(9, 2), make.draw(2, 3, dtype=np.float32), clip, skip, make.draw(1, dtype=np.uint32)]
    sums *= sums
    norms = [make.device.put(np.ones(2)) for _ in range(2)]  # of the step before, and so far
    squared_norm_on_device(launcher, g, total=sums[1:])
    add_losses(launcher, m, sums, accumulate=True, storage=make.dtype.name)
    decide_step(
        launcher, sums, rate, *state, outcome, *norms, beta1=0.9, beta2=0.99, decay=0.1, other_rate=3.0, clip_norm=0.5,
        largest=1e19, limit=1e38, carry=0.9, gain=0.1, amplification=1e8, coupled_decay=0.0,
        maximum_skipped=10, storage=make.dtype.name,
    )  # fmt: skip
    make.collect(results, "decide_step", sums=sums, counts=state[0], numbers=state[1], clip=clip, outcome=outcome)
    moved = adam_step_on_device(
        launcher, p, g, m, v, rate=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8, step=2, weight_decay=0.1, decayed=999,
        decoupled=True, gradient_scale=1.0, copy=copy, clip=clip, skip=skip, measure=True,
    )  # fmt: skip
    make.collect(results, "adam", p=p, m=m, v=v, copy=copy, clip=clip, moved=moved)
    sgd_step(launcher, p, g, m, rate=0.1, momentum=0.9, weight_decay=0.1, decayed=999, gradient_scale=0.5)
    make.collect(results, "sgd", p=p, m=m)
    if make.dtype == BFLOAT16:  # weights that have no masters
        sgd_step(
            launcher, copy, g, m, rate=0.1, momentum=0.9, weight_decay=0.1, decayed=999, gradient_scale=0.5,
            rounding=StochasticRounding(5, 3),
        )  # fmt: skip
        make.collect(results, "sgd_alone", p=copy, m=m)


def _sequence(make: _Maker, results: Results) -> None:
    launcher = make.device.launcher
    tokens, table, learned = make.integers(7, 3, 50), make.draw(7, 40), make.draw(60, 40)
    out, heads = make.draw(150, 40), make.draw(2, 9, 3, 16)
    dropout = Dropout(0.4, seed=1, step=1, site=1, first_element=3)
    embedding_forward(launcher, tokens, table, learned, out, first_position=4, dropout=dropout)
    make.collect(results, "embedding", out=out)
    embedding_backward(launcher, out, tokens, table, learned, accumulate_tokens=True, accumulate_positions=False)
    make.collect(results, "embedding_backward", tokens=table, positions=learned)
    rotary_forward(launcher, heads, *(make.device.put(x) for x in rotary_tables(np, 9, 16, np.float32)))
    make.collect(results, "rotary", x=heads)
    symmetry = Symmetry(make.integers(99, 2, 9), make.device.put(symmetry_turns(7).astype(np.float32)))
    for rotary in (rotary_forward, rotary_backward):
        rotary(launcher, heads, *(make.device.put(x) for x in rotary_tables(np, 9, 16, np.float32)), symmetry=symmetry)
        make.collect(results, f"{rotary.__name__}, symmetry", x=heads)


def _turned_attention(make: _Maker, results: Results, prefix: str, queries: int, keys: int, size: int) -> None:
    """With the symmetry on some pairs, forward and backward."""
    launcher = make.device.launcher
    q, dout, out, dq = (make.draw(1, queries, 2, size) for _ in range(4))
    k, v, dk, dv = (make.draw(1, keys, 1, size) for _ in range(4))
    lse = make.draw(1, 2, queries, dtype=np.float32)
    symmetry = Symmetry(make.integers(99, 1, keys), make.device.put(symmetry_turns(5).astype(np.float32)))
    options: dict[str, Any] = {"causal": True, "scale": 0.2, "symmetry": symmetry}
    attention_forward(launcher, q, k, v, out, lse, **options)
    for method in METHODS:
        attention_backward(launcher, dout, q, k, v, out, lse, dq, dk, dv, method=method, **options)
        make.collect(results, f"{prefix}.{method}", out=out, dq=dq, dk=dk, dv=dv)


def _attention(make: _Maker, results: Results, prefix: str, queries: int, keys: int, heads: int, size: int) -> None:
    launcher = make.device.launcher
    q, dout, out, dq = (make.draw(1, queries, heads, size) for _ in range(4))
    k, v, dk, dv = (make.draw(1, keys, 1, size) for _ in range(4))
    lse = make.draw(1, heads, queries, dtype=np.float32)
    tokens, points = make.integers(4, 1, keys), make.draw(1, keys, 3, dtype=np.float32)
    dscore_bias = ScoreBiasGradients(make.draw(heads, 11), None)
    for score_bias in (None, ScoreBias(tokens, points, make.draw(heads, 11), True, True, True, 8)):
        options: dict[str, Any] = {"causal": True, "scale": 0.2, "score_bias": score_bias}
        attention_forward(launcher, q, k, v, out, lse, **options)
        name = f"{prefix}.{'plain' if score_bias is None else 'terms'}"
        make.collect(results, name, out=out, lse=lse)
        for method in METHODS:
            saved = (out, lse)
            attention_backward(
                launcher, dout, q, k, v, *saved, dq, dk, dv, dscore_bias=dscore_bias, method=method, **options
            )
            make.collect(results, f"{name}.{method}", dq=dq, dk=dk, dv=dv, dscalars=dscore_bias.scalars)
    learned = ScoreBiasGradients(dscore_bias.scalars, make.draw(1, keys, 3, dtype=np.float32))
    attention_backward(launcher, dout, q, k, v, *saved, dq, dk, dv, dscore_bias=learned, **options)
    make.collect(results, f"{prefix}.learned points", dk=dk, dpoints=learned.points)
