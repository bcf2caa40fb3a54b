"""Σ x² in float64; see `cllm_gpu.ops.reference.squared_norm`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.native.arguments import address
from cllm_gpu.ops.native.library import Library


def squared_norm(library: Library, x: Any) -> float:
    """As the reference; x contiguous."""
    return library.kernels(x).squared_norm(x.size, address("x", x, (x.size,), x.dtype))
