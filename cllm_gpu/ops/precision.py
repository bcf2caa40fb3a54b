"""Training precisions: the dtype of stored arrays, and what always stays in float32 or wider.

fp32  everything in float32
tf32  float32 storage; matrix products on an NVIDIA GPU round their operands to TF32 (10 mantissa bits)
bf16  parameters, activations and gradients in bfloat16; sums, statistics, optimizer moments, master weights and
      gradients accumulated over several parts of a batch in float32
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
    """Whether a dtype is narrower than float32, so that weights stored in it alone would lose small updates."""
    return np.dtype(dtype).itemsize < 4


def wide_dtype(dtype: Any) -> np.dtype[Any]:
    """dtype of sums, statistics, moments and master weights for arrays of `dtype`: float32 or wider."""
    return np.dtype(np.float32) if is_narrow(dtype) else np.dtype(dtype)
