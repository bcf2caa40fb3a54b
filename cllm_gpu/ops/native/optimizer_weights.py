"""Checks of the weights passed to an optimizer step."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.reference.rounding import StochasticRounding


def check_decayed(decayed: int, size: int) -> None:
    """Raise ValueError unless 0 ≤ `decayed` ≤ `size`: the first `decayed` of `size` elements get weight decay."""
    if not 0 <= decayed <= size:
        raise ValueError(f"decayed is {decayed}; expected 0 … {size}, the size of parameters")


def check_one_dtype(copy: Any | None, rounding: StochasticRounding | None) -> None:
    """Raise ValueError for a rounded copy or stochastic rounding, which the C++ steps do not support."""
    if copy is not None or rounding is not None:
        raise ValueError("the native operations hold weights in one dtype: no rounded copy, no stochastic rounding")
