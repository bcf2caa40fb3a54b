"""The operations in C++ for the CPU: single-threaded, vectorised; threads come from `cllm_gpu.training.data_parallel`.

`sources/` holds the mathematics; the modules here check their arguments, call, and hold no mathematics. An array that
an operation cannot take (dtype, shape, strides) is a ValueError that names the argument, never a slower path.
"""

from __future__ import annotations

from cllm_gpu.ops.native.attention import attention_backward, attention_forward
from cllm_gpu.ops.native.embedding import embedding_backward, embedding_forward
from cllm_gpu.ops.native.gelu import gelu_backward, gelu_forward
from cllm_gpu.ops.native.layernorm import (
    cross_entropy,
    layernorm_backward,
    layernorm_forward,
    residual_layernorm_forward,
)
from cllm_gpu.ops.native.library import Library, load_library
from cllm_gpu.ops.native.linear import linear_backward, linear_forward
from cllm_gpu.ops.native.optimizer_steps import adam_step, sgd_step, squared_norm
from cllm_gpu.ops.native.rotary import rotary_backward, rotary_forward
from cllm_gpu.ops.reference.mlp import backward_of, forward_of
from cllm_gpu.ops.registry import Operation

NATIVE: dict[str, Operation] = {
    "embedding_forward": embedding_forward,
    "embedding_backward": embedding_backward,
    "linear_forward": linear_forward,
    "linear_backward": linear_backward,
    "gelu_forward": gelu_forward,
    "gelu_backward": gelu_backward,
    "mlp_forward": forward_of(linear_forward, gelu_forward),
    "mlp_backward": backward_of(linear_backward, gelu_backward),
    "layernorm_forward": layernorm_forward,
    "residual_layernorm_forward": residual_layernorm_forward,
    "layernorm_backward": layernorm_backward,
    "rotary_forward": rotary_forward,
    "rotary_backward": rotary_backward,
    "attention_forward": attention_forward,
    "attention_backward": attention_backward,
    "cross_entropy": cross_entropy,
    "squared_norm": squared_norm,
    "adam_step": adam_step,
    "sgd_step": sgd_step,
}
"""By the names of `cllm_gpu.ops.registry`; the first argument of each is a `Library`. (Attention weights, only looked
at by people, stay with the reference.)"""

__all__ = ["NATIVE", "Library", "load_library"]
