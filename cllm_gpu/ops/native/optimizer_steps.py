"""Adam, SGD and the norm on flat buffers; see `cllm_gpu.ops.reference.adam`, `.sgd` and `.norm`."""

from __future__ import annotations

import ctypes
from typing import Any

from cllm_gpu.ops.native.arguments import address, optional
from cllm_gpu.ops.native.library import Library
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
    """As the reference, in one dtype: no copy and no rounding; all arrays contiguous."""
    _check_one_dtype(copy, rounding)
    kernels, dtype, shape = library.kernels(parameters), parameters.dtype, parameters.shape
    _check_decayed(decayed, shape[0])
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
    """As the reference, in one dtype: no copy and no rounding; all arrays contiguous."""
    _check_one_dtype(copy, rounding)
    kernels, dtype, shape = library.kernels(parameters), parameters.dtype, parameters.shape
    _check_decayed(decayed, shape[0])
    return kernels.sgd_step(
        shape[0], decayed,
        address("parameters", parameters, shape, dtype),
        address("gradients", gradients, shape, dtype),
        optional("velocity", velocity, shape, dtype),
        (ctypes.c_double * 4)(rate, momentum, weight_decay, gradient_scale),
    )  # fmt: skip


def squared_norm(library: Library, x: Any) -> float:
    """As the reference; x contiguous."""
    return library.kernels(x).squared_norm(x.size, address("x", x, (x.size,), x.dtype))


def _check_decayed(decayed: int, size: int) -> None:
    if not 0 <= decayed <= size:
        raise ValueError(f"decayed is {decayed}; expected 0 … {size}, the size of parameters")


def _check_one_dtype(copy: Any | None, rounding: StochasticRounding | None) -> None:
    if copy is not None or rounding is not None:
        raise ValueError("the native operations hold weights in one dtype: no rounded copy, no stochastic rounding")
