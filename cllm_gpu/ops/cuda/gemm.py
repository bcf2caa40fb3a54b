"""Matrix products with fp32 accumulation, rounded once.

Computed on a GPU by cuBLASLt (cublaslt.py), with fused epilogues, or by cuBLAS gemmEx if nvmath-python is not
installed; on the simulator by NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm_gpu.ops.cuda.column_major import COMPUTE_32F, COMPUTE_32F_FAST_TF32, CUDA_TYPES, column_major
from cllm_gpu.ops.cuda.cublaslt import WORKSPACE_BYTES
from cllm_gpu.ops.cuda.epilogue import NONE, Epilogue
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.profiling import MATMUL

_ALGORITHM_DEFAULT = -1


def matmul(launcher: Launcher, a: Any, b: Any, out: Any, *, accumulate: bool = False) -> None:
    """out (M, N) = a (M, K) · b (K, N), added to `out` if `accumulate`; summed in fp32, rounded once.

    a and b must be contiguous or transposes of contiguous arrays, of the same dtype; out contiguous, of that dtype or
    float32. Raises UserError otherwise.
    """
    _check(a, b, out)
    if _by_cublaslt(launcher, a, b, out, NONE, accumulate=accumulate):
        return
    if launcher.xp is np:
        with launcher.watched(MATMUL):
            launcher.library_call(_on_host, a, b, out, accumulate=accumulate)
    elif out.size:
        _by_gemmex(launcher, a, b, out, accumulate=accumulate)


def matmul_with(launcher: Launcher, a: Any, b: Any, out: Any, epilogue: Epilogue, *, accumulate: bool = False) -> bool:
    """`matmul` and the epilogue in one kernel; False, with nothing done, if no algorithm supports it.

    That is so without cuBLASLt, for GELU in float32 or in rows whose length is no multiple of 8, for a vector whose
    dtype is not the result's, and if cuBLASLt has no algorithm; the caller then needs another way. `accumulate` allows
    only the epilogue "bias gradient", which is a function of `a`, not of the result; ValueError for others.
    """
    _check(a, b, out)
    return _by_cublaslt(launcher, a, b, out, epilogue, accumulate=accumulate)


def _check(a: Any, b: Any, out: Any) -> None:
    (m, k), (k2, n) = a.shape, b.shape
    if k != k2 or out.shape != (m, n):
        raise UserError(f"matmul: shapes {a.shape} and {b.shape} do not give {out.shape}")
    if a.dtype.name not in CUDA_TYPES or a.dtype != b.dtype or out.dtype.name not in (a.dtype.name, "float32"):
        raise UserError(f"matmul: dtypes {a.dtype.name} and {b.dtype.name} into {out.dtype.name} are not supported")
    if not out.flags.c_contiguous:
        raise UserError(f"matmul: the result is not contiguous: shape {out.shape}, strides {out.strides}")
    for name, x in (("a", a), ("b", b)):
        if not (x.flags.c_contiguous or x.flags.f_contiguous):
            raise UserError(f"matmul: argument {name} is not contiguous: shape {x.shape}, strides {x.strides}")


def _by_cublaslt(launcher: Launcher, a: Any, b: Any, out: Any, epilogue: Epilogue, *, accumulate: bool) -> bool:
    if launcher.lt is None or not out.size or not a.size:
        return False
    return launcher.lt.matmul(
        a,
        b,
        out,
        compute=_compute_type(launcher, a),
        workspace=launcher.scratch("cublaslt", (WORKSPACE_BYTES,), "uint8"),
        stream=0 if launcher.xp is np else launcher.xp.cuda.get_current_stream().ptr,
        accumulate=accumulate,
        epilogue=epilogue,
    )


def _on_host(a: Any, b: Any, out: Any, *, accumulate: bool) -> None:
    if a.dtype == np.float32 and not accumulate:
        np.matmul(a, b, out=out)
        return
    product = np.matmul(a.astype(np.float32, copy=False), b.astype(np.float32, copy=False))
    if accumulate:
        product += out.astype(np.float32, copy=False)
    out[...] = product.astype(out.dtype, copy=False)


def _by_gemmex(launcher: Launcher, a: Any, b: Any, out: Any, *, accumulate: bool) -> None:
    cublas = launcher.xp.cuda.cublas
    handle = launcher.xp.cuda.device.get_cublas_handle()
    (m, k), n = a.shape, b.shape[1]
    first, second = column_major(b), column_major(a)
    one, beta = np.ones(1, np.float32), np.full(1, float(accumulate), np.float32)
    kind, out_kind = CUDA_TYPES[a.dtype.name], CUDA_TYPES[out.dtype.name]
    previous = cublas.getPointerMode(handle)
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)
    try:
        with launcher.watched(MATMUL):
            cublas.gemmEx(
                handle, int(first.transposed), int(second.transposed), n, m, k, one.ctypes.data,
                b.data.ptr, kind, first.leading, a.data.ptr, kind, second.leading, beta.ctypes.data,
                out.data.ptr, out_kind, n, _compute_type(launcher, a), _ALGORITHM_DEFAULT,
            )  # fmt: skip
    finally:
        cublas.setPointerMode(handle, previous)


def _compute_type(launcher: Launcher, a: Any) -> int:
    """TF32 for float32 operands if `launcher.tf32`; accumulation is in fp32 either way."""
    return COMPUTE_32F_FAST_TF32 if launcher.tf32 and a.dtype == np.float32 else COMPUTE_32F
