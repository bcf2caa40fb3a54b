"""In which numbers a run computes: what is stored in which dtype, and what is never below float32.

fp32  everything float32
tf32  float32 storage; an NVIDIA GPU's matrix products round their factors to TF32 (10 bits of mantissa)
bf16  parameters, activations and gradients bfloat16; sums, statistics, moments, master weights and gradients that
      several parts of a batch add to float32
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

Precision = Literal["fp32", "tf32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def storage_dtype(precision: Precision) -> np.dtype[Any]:
    """dtype of parameters, activations and gradients."""
    return BFLOAT16 if precision == "bf16" else np.dtype(np.float32)


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype is below float32: weights held in it alone would lose small updates."""
    return np.dtype(dtype).itemsize < 4


def wide_dtype(dtype: Any) -> np.dtype[Any]:
    """dtype of sums, statistics, moments and master weights beside arrays of `dtype`: never below float32."""
    return np.dtype(np.float32) if is_narrow(dtype) else np.dtype(dtype)
