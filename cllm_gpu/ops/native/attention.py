"""Scaled dot-product attention; see `cllm_gpu.ops.reference.attention`."""

from __future__ import annotations

import ctypes
from typing import Any

from cllm_gpu.ops.native.arguments import address, strided
from cllm_gpu.ops.native.library import Library, check_status
from cllm_gpu.ops.native.score_bias import score_bias_arguments
from cllm_gpu.ops.native.symmetry import symmetry_backward, turned
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients
from cllm_gpu.ops.reference.symmetry import Symmetry


def attention_forward(
    library: Library,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    causal: bool,
    scale: float,
    score_bias: ScoreBias | None = None,
    symmetry: Symmetry | None = None,
) -> None:
    """As the reference; q, k, v and out contiguous along D, lse contiguous. scale must not be 0 with a score bias."""
    q, k = turned(library, q, symmetry), turned(library, k, symmetry)
    kernels, dtype = library.kernels(q), q.dtype
    sizes = _sizes(q, k)
    given = score_bias_arguments(score_bias, None, q, k, scale)
    addresses, strides = _strided(
        dtype, [("q", q, q.shape), ("k", k, k.shape), ("v", v, k.shape), ("out", out, q.shape)]
    )
    status = kernels.attention_forward(
        sizes, causal, *addresses, strides, address("lse", lse, _lse_shape(q), dtype), scale, given
    )
    if status:
        check_status(status, "attention_forward", 0)


def attention_backward(
    library: Library,
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    *,
    causal: bool,
    scale: float,
    score_bias: ScoreBias | None = None,
    dscore_bias: ScoreBiasGradients | None = None,
    symmetry: Symmetry | None = None,
) -> None:
    """As the reference; arrays contiguous along the last axis, lse contiguous. scale not 0 with a score bias."""
    q, k = turned(library, q, symmetry), turned(library, k, symmetry)
    kernels, dtype = library.kernels(q), q.dtype
    sizes, like_q, like_k = _sizes(q, k), q.shape, k.shape
    given = score_bias_arguments(score_bias, dscore_bias, q, k, scale)
    addresses, strides = _strided(
        dtype,
        [("dout", dout, like_q), ("q", q, like_q), ("k", k, like_k), ("v", v, like_k), ("out", out, like_q),
         ("dq", dq, like_q), ("dk", dk, like_k), ("dv", dv, like_k)],
    )  # fmt: skip
    status = kernels.attention_backward(
        sizes, causal, *addresses, strides, address("lse", lse, _lse_shape(q), dtype), scale, given
    )
    if status:
        check_status(status, "attention_backward", 0)
    symmetry_backward(library, dq, symmetry)
    symmetry_backward(library, dk, symmetry)


def _lse_shape(q: Any) -> tuple[int, int, int]:
    return q.shape[0], q.shape[2], q.shape[1]


def _sizes(q: Any, k: Any) -> Any:
    """(B, T, S, H, K, D) as a C array of int64."""
    (b, t, h, d), (kb, s, kv, kd) = q.shape, k.shape
    if kb != b or kd != d or h % kv or s < t:
        raise ValueError(
            f"k is {k.shape} and q is {q.shape}; expected k (B, S, K, D) for q (B, T, H, D), K dividing H, S at least T"
        )
    return (ctypes.c_int64 * 6)(b, t, s, h, kv, d)


def _strided(dtype: Any, arrays: list[tuple[str, Any, tuple[int, ...]]]) -> tuple[list[int], Any]:
    """Addresses of all arrays, and all their strides in one C array of int64."""
    addresses: list[int] = []
    strides: list[int] = []
    for name, x, shape in arrays:
        data, steps = strided(name, x, shape, dtype)
        addresses.append(data)
        strides += steps
    return addresses, (ctypes.c_int64 * len(strides))(*strides)
