"""SGD with momentum on flat buffers; see `cllm_gpu.ops.reference.sgd`."""

from __future__ import annotations

import ctypes
from typing import Any

from cllm_gpu.ops.native.arguments import address, optional
from cllm_gpu.ops.native.library import Library
from cllm_gpu.ops.native.optimizer_weights import check_decayed, check_one_dtype
from cllm_gpu.ops.reference.rounding import StochasticRounding


def sgd_step(
    library: Library,
    parameters: Any,
    gradients: Any,
    velocity: Any | None,
    copy: Any | None = None,
    *,
    rate: float,
    momentum: float,
    weight_decay: float,
    decayed: int,
    gradient_scale: float,
    rounding: StochasticRounding | None = None,
) -> float:
    """As the reference, in one dtype: copy and rounding must be None; all arrays contiguous."""
    check_one_dtype(copy, rounding)
    kernels, dtype, shape = library.kernels(parameters), parameters.dtype, parameters.shape
    check_decayed(decayed, shape[0])
    return kernels.sgd_step(
        shape[0], decayed,
        address("parameters", parameters, shape, dtype),
        address("gradients", gradients, shape, dtype),
        optional("velocity", velocity, shape, dtype),
        (ctypes.c_double * 4)(rate, momentum, weight_decay, gradient_scale),
    )  # fmt: skip
