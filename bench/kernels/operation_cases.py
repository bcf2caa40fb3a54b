"""The test cases, one function per operation, named as in `cllm_gpu.ops.registry`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.kernels.cases import Array, Case, Draw, Sizes
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.reference.attention import attention_forward
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.ops.reference.gelu import gelu_forward
from cllm_gpu.ops.reference.rotary import rotary_tables
from cllm_gpu.ops.registry import implementation, operations_on

MASK = Dropout(0.25, seed=2**63 + 12345, step=2**31 + 5, site=2, first_element=2**33 + 6)


def _embedding_forward(d: Draw) -> Case:
    s = d.sizes
    return Case(
        "embedding_forward",
        {
            "tokens": d.tokens(),
            "token_embedding": d(s.vocabulary, s.width),
            "position_embedding": d(s.length + 3, s.width),
            "out": d.empty(s.rows, s.width),
        },
        written=("out",),
        options={"first_position": 2, "dropout": MASK},
    )


def _embedding_backward(d: Draw) -> Case:
    s = d.sizes
    return Case(
        "embedding_backward",
        {
            "dout": d(s.rows, s.width),
            "tokens": d.tokens(),
            "dtoken_embedding": d.empty(s.vocabulary, s.width),
            "dposition_embedding": d(s.length, s.width),
        },
        written=("dtoken_embedding",),
        updated=("dposition_embedding",),
        options={"accumulate_tokens": False, "accumulate_positions": True},
        growth=4 + s.rows,
    )


def _linear_forward(d: Draw) -> Case:
    s = d.sizes
    return Case(
        "linear_forward",
        {
            "x": d(s.rows, s.width),
            "weight": d(s.mlp_width, s.width),
            "bias": d(s.mlp_width),
            "out": d.empty(s.rows, s.mlp_width),
        },
        written=("out",),
        growth=4 + s.width,
        roundings=2,  # the product, then the sum with the bias
    )


def _linear_backward(d: Draw) -> Case:
    s = d.sizes
    return Case(
        "linear_backward",
        {
            "dout": d(s.rows, s.mlp_width),
            "x": d(s.rows, s.width),
            "weight": d(s.mlp_width, s.width),
            "dx": d.empty(s.rows, s.width),
            "dweight": d(s.mlp_width, s.width),
            "dbias": d(s.mlp_width),
        },
        written=("dx",),
        updated=("dweight", "dbias"),
        options={"accumulate": True},
        growth=4 + max(s.rows, s.mlp_width),
    )


def _gelu_forward(d: Draw) -> Case:
    s = d.sizes
    operands = {"x": d(s.rows, s.mlp_width), "bias": d(s.mlp_width), "out": d.empty(s.rows, s.mlp_width)}
    # h = x + bias is rounded before gelu, whose slope is at most 1.13
    return Case("gelu_forward", operands, written=("out",), updated=("x",), growth=10, roundings=2.2)


def _gelu_backward(d: Draw) -> Case:
    s = d.sizes
    return Case(
        "gelu_backward",
        {
            "dout": d(s.rows, s.mlp_width),
            "x": d(s.rows, s.mlp_width),
            "dx": d.empty(s.rows, s.mlp_width),
            "dbias": d.empty(s.mlp_width),
        },
        written=("dx", "dbias"),
        options={"accumulate": False},
        growth=24 + s.rows,
    )


def _mlp_operands(d: Draw) -> dict[str, Array]:
    s = d.sizes
    return {
        "up_weight": d(s.mlp_width, s.width),
        "up_bias": d(s.mlp_width),
        "down_weight": d(s.width, s.mlp_width),
        "down_bias": d(s.width),
    }


def _mlp_forward(d: Draw) -> Case:
    s = d.sizes
    results = {name: d.empty(s.rows, s.mlp_width) for name in ("hidden", "activated")}
    # the product, its sum with the bias and gelu are rounded; the last product averages these errors
    return Case(
        "mlp_forward",
        {"x": d(s.rows, s.width)} | _mlp_operands(d) | results | {"out": d.empty(s.rows, s.width)},
        written=("hidden", "activated", "out"),
        growth=10 + s.width + s.mlp_width,
        roundings=4,
    )


def _mlp_backward(d: Draw) -> Case:
    s = d.sizes
    weights = _mlp_operands(d)
    hidden = d(s.rows, s.mlp_width)
    activated = np.empty_like(hidden, np.float64)
    gelu_forward(np, hidden.astype(np.float64), None, activated)
    given = {"dout": d(s.rows, s.width), "x": d(s.rows, s.width), "hidden": hidden}
    given |= {"activated": activated.astype(d.dtype)} | {n: weights[n] for n in ("up_weight", "down_weight")}
    results = {"dhidden": d.empty(s.rows, s.mlp_width), "dx": d.empty(s.rows, s.width)}
    gradients = {f"d{name}": d(*x.shape) for name, x in weights.items()}
    # the product before gelu' is rounded, and so is dhidden, an operand of the other products
    return Case(
        "mlp_backward",
        given | results | gradients,
        written=tuple(results),
        updated=tuple(gradients),
        options={"accumulate": True},
        growth=30 + max(s.rows, s.width, s.mlp_width),
        roundings=4,
    )


def _layernorm_forward(d: Draw) -> Case:
    s = d.sizes
    return Case(
        "layernorm_forward",
        {
            "x": d(s.rows, s.width),
            "weight": d(s.width),
            "bias": d(s.width),
            "out": d.empty(s.rows, s.width),
            "mean": d.statistics(),
            "rstd": d.statistics(),
        },
        written=("out", "mean", "rstd"),
        options={"epsilon": 1e-5},
        growth=40,
    )


def _residual_layernorm_forward(d: Draw) -> Case:
    s = d.sizes
    return Case(
        "residual_layernorm_forward",
        {
            "residual": d(s.rows, s.width),
            "branch": d(s.rows, s.width),
            "weight": d(s.width),
            "bias": d(s.width),
            "residual_out": d.empty(s.rows, s.width),
            "out": d.empty(s.rows, s.width),
            "mean": d.statistics(),
            "rstd": d.statistics(),
        },
        written=("residual_out", "out", "mean", "rstd"),
        options={"epsilon": 1e-5, "dropout": MASK},
        growth=40,
        roundings=4,  # the dropped branch, the sum, and the result; the weights reach a few
    )


def _layernorm_backward(d: Draw) -> Case:
    s = d.sizes
    x = d(s.rows, s.width)
    wide = x.astype(np.float64)
    return Case(
        "layernorm_backward",
        {
            "dout": d(s.rows, s.width),
            "x": x,
            "weight": d(s.width),
            "mean": wide.mean(axis=1).astype(np.float32),
            "rstd": (1.0 / np.sqrt(wide.var(axis=1) + 1e-5)).astype(np.float32),
            "dresidual": d(s.rows, s.width),
            "dx": d.empty(s.rows, s.width),
            "dbranch": d.empty(s.rows, s.width),
            "dweight": d(s.width),
            "dbias": d(s.width),
        },
        written=("dx", "dbranch"),
        updated=("dweight", "dbias"),
        options={"accumulate": True, "dropout": MASK},
        growth=60 + s.rows,
    )


def _rotary_forward(d: Draw) -> Case:
    return _rotary(d, "rotary_forward", "x")


def _rotary_backward(d: Draw) -> Case:
    return _rotary(d, "rotary_backward", "dx")


def _rotary(d: Draw, operation: str, turned: str) -> Case:
    s = d.sizes
    even = s.head_size // 2 * 2
    cosine, sine = rotary_tables(np, s.length, even, np.float32)
    operands = {turned: d(s.batch, s.length, s.heads, even), "cosine": cosine, "sine": sine}
    return Case(operation, operands, updated=(turned,), growth=4)


def _attention_inputs(d: Draw) -> dict[str, Array]:
    s = d.sizes
    return {
        "q": d(s.batch, s.length, s.heads, s.head_size),
        "k": d(s.batch, s.length, s.kv_heads, s.head_size),
        "v": d(s.batch, s.length, s.kv_heads, s.head_size),
    }


def _attention_options(d: Draw) -> dict[str, Any]:
    return {"causal": True, "scale": 1.0 / math.sqrt(d.sizes.head_size)}


def _attention_forward(d: Draw) -> Case:
    s = d.sizes
    out = d.empty(s.batch, s.length, s.heads, s.head_size)
    lse = np.full((s.batch, s.heads, s.length), np.nan, np.float32)
    # bf16: the weights are rounded before the product with v, and so is the result
    return Case(
        "attention_forward",
        _attention_inputs(d) | {"out": out, "lse": lse},
        written=("out", "lse"),
        options=_attention_options(d),
        growth=40 + s.length,
        roundings=3,
        least=1.0,
    )


def _attention_backward(d: Draw) -> Case:
    """The given output and log-sum-exp are exact values, rounded once."""
    s, inputs = d.sizes, _attention_inputs(d)
    out, lse = np.empty(inputs["q"].shape), np.empty((s.batch, s.heads, s.length))
    wide = [x.astype(np.float64) for x in inputs.values()]
    attention_forward(np, wide[0], wide[1], wide[2], out, lse, **_attention_options(d))
    gradients = {f"d{name}": np.full_like(x, np.nan) for name, x in inputs.items()}
    saved = {"out": out.astype(d.dtype), "lse": lse.astype(np.float32)}
    # bf16: the weights and the gradients of the scores are rounded before the products that sum over the sequence
    return Case(
        "attention_backward",
        {"dout": d(s.batch, s.length, s.heads, s.head_size)} | inputs | saved | gradients,
        written=tuple(gradients),
        options=_attention_options(d),
        growth=40 + s.length,
        roundings=6,
        least=1.0,
    )


def _attention_weights(d: Draw) -> Case:
    inputs = _attention_inputs(d)
    given = {name: inputs[name] for name in ("q", "k")}
    return Case("attention_weights", given, options=_attention_options(d), growth=40, roundings=0)


def _cross_entropy(d: Draw) -> Case:
    s = d.sizes
    targets = d.generator.integers(0, s.vocabulary, s.rows).astype(np.int32)
    targets[s.rows // 2] = -1
    return Case(
        "cross_entropy",
        {"logits": d(s.rows, s.vocabulary), "targets": targets, "losses": d.statistics()},
        written=("losses",),
        updated=("logits",),
        options={"ignore_index": -1, "gradient_scale": 0.125},
        growth=40,
    )


def _flat_size(s: Sizes) -> int:
    """Not a multiple of a vector length; several blocks."""
    return s.rows * s.mlp_width + 3


def _squared_norm(d: Draw) -> Case:
    return Case("squared_norm", {"x": d(_flat_size(d.sizes))}, roundings=0)


def _adam_step(d: Draw) -> Case:
    n = _flat_size(d.sizes)
    operands: dict[str, Array] = {
        "parameters": d.float32(n),
        "gradients": d(n),
        "first_moment": d.float32(n),
        "second_moment": d.generator.random(n, np.float32),
    }
    options = {
        "rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "step": 3, "weight_decay": 0.1,
        "decayed": n // 3, "decoupled": True, "gradient_scale": 0.5,
    }  # fmt: skip
    moved = ("parameters", "first_moment", "second_moment")
    return Case("adam_step", operands, updated=moved, options=options, growth=30, roundings=0)


def _sgd_step(d: Draw) -> Case:
    n = _flat_size(d.sizes)
    operands: dict[str, Array] = {"parameters": d.float32(n), "gradients": d(n), "velocity": d.float32(n)}
    options = {"rate": 0.1, "momentum": 0.9, "weight_decay": 0.2, "decayed": n // 2, "gradient_scale": 0.5}
    return Case("sgd_step", operands, updated=("parameters", "velocity"), options=options, growth=10, roundings=0)


MAKERS: dict[str, Callable[[Draw], Case]] = {name: globals()[f"_{name}"] for name in operations_on("cuda")}
"""Operation → the function above with its name; an operation without a case is a KeyError at import."""
OTHER_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention_backward, fused": ("attention_backward", {"method": "fused"}),
}
"""Alternative CUDA methods of operations: name → (operation, options that select the method)."""
NAMES = (*MAKERS, *OTHER_METHODS)


def make_case(name: str, storage: str, sizes: Sizes) -> Case:
    """The case of an operation, or of one of OTHER_METHODS; with the same operands at every call."""
    operation, options = OTHER_METHODS.get(name, (name, {}))
    return dataclasses.replace(MAKERS[operation](Draw(storage, sizes)), cuda_options=options)


def cuda_side(case: Case, launcher: Launcher) -> Callable[..., Any]:
    """The CUDA implementation of the case's operation with `launcher`, for Bound."""
    operation = implementation(case.name, "cuda")
    return lambda *arguments, **options: operation(launcher, *arguments, **options, **case.cuda_options)
