"""The operations a model and an optimizer are made of: one name for each, whoever computes it.

`ops/reference/` defines each one; `ops/native/` (C++ on the CPU), `ops/cuda/` and the simulator give the same functions
with the same parameters after the first, which is what that side computes with (an array module, a library, a
launcher). `bind` fixes that first argument, so the model never sees it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from cllm_gpu.ops.reference import adam, attention, cross_entropy, embedding, gelu, layernorm, linear, mlp, rotary, sgd
from cllm_gpu.ops.reference import squared_norm as norm

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Operations:
    """Every operation, ready to call with arrays. Documented where defined, in `cllm_gpu.ops.reference`."""

    embedding_forward: Operation
    embedding_backward: Operation
    linear_forward: Operation
    linear_backward: Operation
    gelu_forward: Operation
    gelu_backward: Operation
    mlp_forward: Operation
    mlp_backward: Operation
    layernorm_forward: Operation
    residual_layernorm_forward: Operation
    layernorm_backward: Operation
    rotary_forward: Operation
    rotary_backward: Operation
    attention_forward: Operation
    attention_backward: Operation
    attention_weights: Operation
    cross_entropy: Operation
    squared_norm: Operation
    adam_step: Operation
    sgd_step: Operation


REFERENCE: dict[str, Operation] = {
    "embedding_forward": embedding.embedding_forward,
    "embedding_backward": embedding.embedding_backward,
    "linear_forward": linear.linear_forward,
    "linear_backward": linear.linear_backward,
    "gelu_forward": gelu.gelu_forward,
    "gelu_backward": gelu.gelu_backward,
    "mlp_forward": mlp.mlp_forward,
    "mlp_backward": mlp.mlp_backward,
    "layernorm_forward": layernorm.layernorm_forward,
    "residual_layernorm_forward": layernorm.residual_layernorm_forward,
    "layernorm_backward": layernorm.layernorm_backward,
    "rotary_forward": rotary.rotary_forward,
    "rotary_backward": rotary.rotary_backward,
    "attention_forward": attention.attention_forward,
    "attention_backward": attention.attention_backward,
    "attention_weights": attention.attention_weights,
    "cross_entropy": cross_entropy.cross_entropy,
    "squared_norm": norm.squared_norm,
    "adam_step": adam.adam_step,
    "sgd_step": sgd.sgd_step,
}
NAMES = tuple(field.name for field in fields(Operations))


def bind(functions: Mapping[str, Operation], first: Any) -> Operations:
    """All of `functions` (one for every name) with their first argument fixed."""
    return Operations(**{name: functools.partial(functions[name], first) for name in NAMES})


def bind_over(functions: Mapping[str, Operation], first: Any, base: Operations) -> Operations:
    """`base` with the given functions, bound to `first`, in place of those of the same name."""
    chosen = {name: getattr(base, name) for name in NAMES}
    chosen |= {name: functools.partial(function, first) for name, function in functions.items()}
    return Operations(**chosen)
