"""Matrix products: cuBLAS on a GPU (fp32 accumulation, bf16 or fp32 storage), NumPy on the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm_gpu.errors import UserError
from cllm_gpu.fused.launcher import Launcher

# cudaDataType_t and cublasComputeType_t, by value as in library_types.h and cublas_api.h
_CUDA_TYPES = {"float32": 0, "bfloat16": 14}
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32 = 68, 77
_ALGORITHM_DEFAULT = -1
_NOT_TRANSPOSED, _TRANSPOSED = 0, 1


def matmul(launcher: Launcher, a: Any, b: Any, out: Any, *, accumulate: bool = False) -> None:
    """out (M, N) = a (M, K) · b (K, N), added to `out` when accumulating; summed in fp32, rounded once.

    a and b are contiguous or the transpose of a contiguous array, of one dtype; out is contiguous, of their dtype or
    float32. UserError otherwise.
    """
    _check(a, b, out)
    if launcher.xp is np:
        _on_host(a, b, out, accumulate=accumulate)
    elif out.size:
        _on_gpu(launcher, a, b, out, accumulate=accumulate)


def _check(a: Any, b: Any, out: Any) -> None:
    (m, k), (k2, n) = a.shape, b.shape
    if k != k2 or out.shape != (m, n):
        raise UserError(f"matmul: shapes {a.shape} and {b.shape} do not give {out.shape}")
    if a.dtype.name not in _CUDA_TYPES or a.dtype != b.dtype or out.dtype.name not in (a.dtype.name, "float32"):
        raise UserError(f"matmul: dtypes {a.dtype.name} and {b.dtype.name} into {out.dtype.name} are not supported")
    if not out.flags.c_contiguous:
        raise UserError(f"matmul: the result is not contiguous: shape {out.shape}, strides {out.strides}")
    for name, x in (("a", a), ("b", b)):
        if not (x.flags.c_contiguous or x.flags.f_contiguous):
            raise UserError(f"matmul: argument {name} is not contiguous: shape {x.shape}, strides {x.strides}")


def _on_host(a: Any, b: Any, out: Any, *, accumulate: bool) -> None:
    if a.dtype == np.float32 and not accumulate:
        np.matmul(a, b, out=out)
        return
    product = np.matmul(a.astype(np.float32, copy=False), b.astype(np.float32, copy=False))
    if accumulate:
        product += out.astype(np.float32, copy=False)
    out[...] = product.astype(out.dtype, copy=False)


def _operand(x: Any) -> tuple[int, int]:
    """(transposition, leading dimension) of row-major x seen as its column-major transpose."""
    if x.flags.c_contiguous:
        return _NOT_TRANSPOSED, max(1, x.shape[1])
    return _TRANSPOSED, max(1, x.shape[0])


def _on_gpu(launcher: Launcher, a: Any, b: Any, out: Any, *, accumulate: bool) -> None:
    """Row-major out = a·b is column-major outᵀ = bᵀ·aᵀ: the operands change places."""
    cublas = launcher.xp.cuda.cublas
    handle = launcher.xp.cuda.device.get_cublas_handle()
    (m, k), n = a.shape, b.shape[1]
    b_transposed, b_leading = _operand(b)
    a_transposed, a_leading = _operand(a)
    one, beta = np.ones(1, np.float32), np.full(1, float(accumulate), np.float32)
    kind, out_kind = _CUDA_TYPES[a.dtype.name], _CUDA_TYPES[out.dtype.name]
    previous = cublas.getPointerMode(handle)
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)
    try:
        cublas.gemmEx(
            handle, b_transposed, a_transposed, n, m, k, one.ctypes.data,
            b.data.ptr, kind, b_leading, a.data.ptr, kind, a_leading, beta.ctypes.data,
            out.data.ptr, out_kind, n, _compute_type(launcher), _ALGORITHM_DEFAULT,
        )  # fmt: skip
    finally:
        cublas.setPointerMode(handle, previous)


def _compute_type(launcher: Launcher) -> int:
    """TF32 products of float32 where the launcher asks for them; sums are fp32 either way."""
    return _COMPUTE_32F_FAST_TF32 if launcher.tf32 else _COMPUTE_32F
