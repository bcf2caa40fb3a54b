"""Adam and AdamW on flat buffers; see `cllm_gpu.ops.reference.adam`."""

from __future__ import annotations

import ctypes
from typing import Any

from cllm_gpu.ops.native.arguments import address
from cllm_gpu.ops.native.library import Library
from cllm_gpu.ops.native.optimizer_weights import check_decayed, check_one_dtype
from cllm_gpu.ops.reference.rounding import StochasticRounding


def adam_step(
    library: Library,
    parameters: Any,
    gradients: Any,
    first_moment: Any,
    second_moment: Any,
    copy: Any | None = None,
    *,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    weight_decay: float,
    decayed: int,
    decoupled: bool,
    gradient_scale: float,
    rounding: StochasticRounding | None = None,
) -> float:
    """As the reference, in one dtype: copy and rounding must be None; all arrays contiguous."""
    check_one_dtype(copy, rounding)
    kernels, dtype, shape = library.kernels(parameters), parameters.dtype, parameters.shape
    check_decayed(decayed, shape[0])
    numbers = (ctypes.c_double * 8)(
        rate, beta1, beta2, epsilon, 1.0 - beta1**step, 1.0 - beta2**step, weight_decay, gradient_scale
    )
    return kernels.adam_step(
        shape[0], decayed,
        address("parameters", parameters, shape, dtype),
        address("gradients", gradients, shape, dtype),
        address("first_moment", first_moment, shape, dtype),
        address("second_moment", second_moment, shape, dtype),
        numbers, decoupled,
    )  # fmt: skip
