"""Roofline of a training step: the time of each class of kernel, compared with its minimum on this GPU.

The work of a class is counted from the shape of the model (bf16 activations, weights and gradients, float32 moments and
master weights; causal attention counted half, as in `counts`): the FLOP of its matrix products and the minimum bytes it
must move. The minimum time is the larger of FLOP over the measured rate of a matrix product and bytes over that of a
copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.kernels.counts import ADAM_BFLOAT16, attention_backward_flops, attention_forward_flops, matmul_flops
from bench.kernels.report import table
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import parameter_specs
from cllm_gpu.utils.profiling import MATMUL

PRODUCTS, ATTENTION, LOSS = "matrix products", "attention", "softmax and cross-entropy"
NORM, NORM_BACKWARD = "residual + layer norm forward", "layer norm backward"
BIASES, GELU, GELU_BACKWARD = "biases and their gradients", "GELU forward", "GELU backward"
EMBEDDING, OPTIMIZER, LATTICE, OTHER = "embedding, gradient norm, decisions", "optimizer", "lattice terms", "other"
CLASSES = (
    PRODUCTS, ATTENTION, LOSS, NORM, NORM_BACKWARD, BIASES, GELU, GELU_BACKWARD, EMBEDDING, OPTIMIZER, LATTICE, OTHER
)  # fmt: skip
CLASS_OF: dict[str, str] = {
    MATMUL: PRODUCTS,
    "attention_forward": ATTENTION,
    "attention_backward_delta": ATTENTION,
    "attention_backward_keys": ATTENTION,
    "attention_backward_queries": ATTENTION,
    "attention_backward_fused": ATTENTION,
    "cross_entropy": LOSS,
    "layernorm_forward": NORM,
    "residual_layernorm_forward": NORM,
    "layernorm_backward": NORM_BACKWARD,
    "bias_add": BIASES,
    "column_sum_partial": BIASES,
    "gelu_forward": GELU,
    "gelu_backward": GELU_BACKWARD,
    "embedding_forward": EMBEDDING,
    "embedding_backward": EMBEDDING,
    "embedding_backward_join": EMBEDDING,
    "embedding_backward_positions": EMBEDDING,
    "squared_norm": EMBEDDING,
    "add_losses": EMBEDDING,
    "decide_step": EMBEDDING,
    "adam_step": OPTIMIZER,
    "sgd_step": OPTIMIZER,
    "attention_pad_tokens": LATTICE,
    "attention_terms_finish": LATTICE,
    "attention_points_finish": LATTICE,
    "rotary": OTHER,
}
"""Kernel → class."""
FINISHES = frozenset({"column_sum_finish", "sum_finish"})
"""Kernels that finish a sum of the preceding kernel and belong to its class."""


@dataclass(frozen=True)
class Work:
    """The work of one class in one step."""

    launches: int
    flop: float
    bytes: float


def classes_of(kernels: Iterable[str]) -> list[str]:
    """The class of each launch of a sequence, in order. Raises KeyError for an unknown kernel.

    >>> classes_of(["layernorm_backward", "column_sum_finish", "matmul"])
    ['layer norm backward', 'layer norm backward', 'matrix products']
    """
    found: list[str] = []
    for kernel in kernels:
        found.append(found[-1] if kernel in FINISHES and found else CLASS_OF[kernel])
    return found


def step_work(a: Architecture, batch: int, *, fused: bool) -> dict[str, Work]:
    """The minimum work of one step with `batch` sequences of a.context tokens, by class; AdamW, no dropout.

    fused: biases and GELU are fused into the matrix products, as with cuBLASLt. They then have no classes, and the
    products also write the input of GELU. Classes that do not occur with standard attention and learned positions are
    omitted. Launches are those of our kernels, without recomputation and with the logits in one chunk.
    """
    rows, layers = batch * a.context, a.layers
    wide = 2.0 * rows * a.width
    """Bytes of an array of activations (N, C)."""
    hidden, qkv = 2.0 * rows * a.mlp_width, 2.0 * rows * a.qkv_width
    parameters = sum(spec.size for spec in parameter_specs(a))
    work = {
        PRODUCTS: _products(a, rows, kept=2 * hidden * layers if fused else 0.0),
        ATTENTION: _attention(a, batch),
        LOSS: Work(1, 0.0, 2 * 2.0 * rows * a.vocabulary),
        # reads residual stream and branch, writes their sum and its norm; the first norm has no branch and no sum
        NORM: Work(2 * layers + 1, 0.0, (4 * 2 * layers + 2) * wide + _statistics(a, rows)),
        # the last norm has no gradient to add to; one kernel and two sums each
        NORM_BACKWARD: Work(3 * (2 * layers + 1), 0.0, (4 * 2 * layers + 3) * wide + _statistics(a, rows)),
        EMBEDDING: _small(a, rows, parameters),
        OPTIMIZER: Work(2, 0.0, float(ADAM_BFLOAT16 * parameters)),
    }
    if not fused:
        # qkv, projection and down: the bias is added in place; its gradient is summed by a kernel and its finish. The
        # bias of up is fused with GELU; a separate kernel for it would read 2·hidden more
        work[BIASES] = Work(9 * layers, 0.0, 3 * layers * (qkv + 2 * wide))
        work[GELU] = Work(layers, 0.0, 2 * layers * hidden)
        work[GELU_BACKWARD] = Work(2 * layers, 0.0, 3 * layers * hidden)
    return work


def _products(a: Architecture, rows: int, *, kept: float) -> Work:
    """Three products per layer: the forward and the two of the backward; operands read once, results written once."""
    layer = [(a.width, a.qkv_width), (a.width, a.width), (a.width, a.mlp_width), (a.mlp_width, a.width)]
    sizes = [*(a.layers * layer), (a.width, a.vocabulary)]
    flop = sum(3 * matmul_flops(rows, k, m) for k, m in sizes)
    moved = sum(3 * 2.0 * (rows * (k + m) + k * m) for k, m in sizes)
    return Work(3 * len(sizes), flop, moved + kept)


def _attention(a: Architecture, batch: int) -> Work:
    shape = (batch, a.heads, a.context, a.head_size)
    flop = attention_forward_flops(*shape, causal=True) + attention_backward_flops(*shape, causal=True)
    rows = batch * a.context
    queries, both = 2.0 * rows * a.width, 2.0 * rows * a.kv_width * 2
    forward = 2 * queries + both  # q, k, v; the output
    backward = 4 * queries + 2 * both  # q, k, v, the output and its gradient; the three gradients
    sums = 3 * 4.0 * rows * a.heads  # log-sum-exp, written and read, and the backward's delta
    # forward; the backward's delta, keys and queries
    return Work(4 * a.layers, a.layers * flop, a.layers * (forward + backward + sums))


def _statistics(a: Architecture, rows: int) -> float:
    """Bytes of the mean and reciprocal standard deviation of every row of every norm."""
    return (2 * a.layers + 1) * 2 * 4.0 * rows


def _small(a: Architecture, rows: int, parameters: int) -> Work:
    """Embedding, gradient norm and decisions. The embedding gradients read that of the residual stream twice, once per
    table. Gradients are not zeroed: the first product of a step overwrites them.
    """
    wide, touched = 2.0 * rows * a.width, 2.0 * min(rows, a.vocabulary) * a.width
    positions = 2.0 * a.context * a.width
    # embedding, its three backward kernels, two of the gradient norm, the sum of the losses, the decisions
    return Work(8, 0.0, (2 * wide + positions) + (2 * wide + 2 * touched + positions) + 2.0 * parameters)


# ---- compared with measurements


@dataclass(frozen=True)
class Measured:
    """Launches per step of one class, and their total time in milliseconds; None in a rehearsal."""

    launches: float
    milliseconds: float | None


def profile_rows(
    work: Mapping[str, Work], measured: Mapping[str, Measured], copy_terabytes: float | None, teraflops: float | None
) -> list[dict[str, Any]]:
    """A row per class that was launched or is in `work`: counted work, minimum and measured time, and their ratio.

    work: from `step_work` for the measured model. Rates in TB/s and TFLOP/s; None if they were not measured.
    """
    rows = []
    for name in CLASSES:
        if name not in work and name not in measured:
            continue
        counted, seen = work.get(name), measured.get(name, Measured(0, None))
        least = None if counted is None else least_milliseconds(counted, copy_terabytes, teraflops)
        ratio = seen.milliseconds / least if least and seen.milliseconds is not None else None
        rows.append(
            {
                "class": name,
                "launches": seen.launches,
                "launches_counted": None if counted is None else counted.launches,
                "teraflop": None if counted is None else counted.flop / 1e12,
                "gigabytes": None if counted is None else counted.bytes / 1e9,
                "least_milliseconds": least,
                "milliseconds": seen.milliseconds,
                "times_the_least": ratio,
            }
        )
    return rows


def least_milliseconds(work: Work, copy_terabytes: float | None, teraflops: float | None) -> float | None:
    """The larger of the times for moving the bytes and for computing the FLOP; None without the rates.

    >>> least_milliseconds(Work(1, 2e12, 1e12), 4.0, 1000.0)
    250.0
    """
    if copy_terabytes is None or teraflops is None:
        return None
    return max(work.bytes / copy_terabytes, work.flop / teraflops) / 1e9


def largest_gaps(rows: Iterable[Mapping[str, Any]], count: int = 2) -> list[dict[str, Any]]:
    """The classes that exceed their minimum time the most, in descending order; classes without a minimum are omitted.

    >>> [gap["class"] for gap in largest_gaps([{"class": "x", "least_milliseconds": 1.0, "milliseconds": 3.0}])]
    ['x']
    """
    gaps = [
        {"class": row["class"], "milliseconds": row["milliseconds"] - row["least_milliseconds"]}
        for row in rows
        if row["milliseconds"] is not None and row["least_milliseconds"] is not None
    ]
    return sorted(gaps, key=lambda gap: -gap["milliseconds"])[:count]


def gaps_sentence(gaps: Iterable[Mapping[str, Any]]) -> str:
    """The gaps in one sentence.

    >>> gaps_sentence([{"class": "attention", "milliseconds": 3.25}])
    'the largest gaps to the least: attention 3.2 ms'
    """
    spoken = ", ".join(f"{gap['class']} {gap['milliseconds']:.1f} ms" for gap in gaps)
    return f"the largest gaps to the least: {spoken}" if spoken else "no gaps: nothing was timed"


def profile_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a table."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    header = ["class of kernel", "launches", "counted", "TFLOP", "GB", "least ms", "ms", "times the least"]
    lines = [
        [
            row["class"],
            f"{row['launches']:g}",
            cell(row["launches_counted"], "d"),
            cell(row["teraflop"], ".3g"),
            cell(row["gigabytes"], ".3g"),
            cell(row["least_milliseconds"], ".2f"),
            cell(row["milliseconds"], ".2f"),
            cell(row["times_the_least"], ".2f"),
        ]
        for row in rows
    ]
    return table(header, lines)
