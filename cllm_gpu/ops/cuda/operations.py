"""The table of fused operations, by the names of `cllm_gpu.ops.registry`, and their binding to a launcher."""

from __future__ import annotations

import functools
from typing import Any

from cllm_gpu.ops.cuda import (
    adam,
    attention,
    cross_entropy,
    embedding,
    gelu,
    layernorm,
    linear,
    mlp,
    rotary,
    sgd,
    squared_norm,
    step_decision,
)
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.registry import NAMES, Operation, Operations
from cllm_gpu.ops.stream import Device, Stream
from cllm_gpu.utils.profiling import Ranges

FUSED: dict[str, Operation] = {
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
    "squared_norm": squared_norm.squared_norm,
    "adam_step": adam.adam_step,
    "sgd_step": sgd.sgd_step,
}


def fused_operations(launcher: Launcher, ranges: Ranges) -> Operations:
    """Every operation launching through `launcher`, each in a profiler range of its name."""
    return Operations(**{name: _in_range(ranges, name, functools.partial(FUSED[name], launcher)) for name in NAMES})


def fused_device(launcher: Launcher, stream: Stream, replays: str) -> Device:
    """The operations of a step that runs without the host, launching through `launcher` into `stream`."""
    on_device = (step_decision.add_losses, step_decision.decide_step, squared_norm.squared_norm_on_device)
    steps = (adam.adam_step_on_device, sgd.sgd_step_on_device)
    return Device(stream, replays, *(functools.partial(operation, launcher) for operation in (*on_device, *steps)))


def _in_range(ranges: Ranges, name: str, operation: Operation) -> Operation:
    label = f"operation/{name}"

    @functools.wraps(operation)
    def ranged(*arguments: Any, **options: Any) -> Any:
        with ranges(label):
            return operation(*arguments, **options)

    return ranged
