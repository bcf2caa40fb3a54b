"""Row-major arrays as operands of cuBLAS and cuBLASLt, which are column-major.

The memory of a row-major (R, C) array is that of a column-major (C, R) matrix with leading dimension C: its transpose.
So row-major out (M, N) = a (M, K) · b (K, N) is computed as column-major outᵀ (N, M) = bᵀ (N, K) · aᵀ (K, M): b is the
library's first operand, a its second, N its rows, M its columns. An array that is itself the transpose of a row-major
array (a weight's `.T`) is passed as it is stored and flagged as transposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# cudaDataType_t and cublasComputeType_t, by value as in library_types.h and cublas_api.h
CUDA_TYPES = {"float32": 0, "bfloat16": 14}
COMPUTE_32F, COMPUTE_32F_FAST_TF32 = 68, 77


@dataclass(frozen=True)
class Matrix:
    """A two-dimensional array as a column-major matrix, and whether the product uses its transpose."""

    rows: int
    columns: int
    transposed: bool

    @property
    def leading(self) -> int:
        """Leading dimension: elements from one column to the next."""
        return max(1, self.rows)


def column_major(x: Any) -> Matrix:
    """x (R, C), row-major or the transpose of a row-major array, as the operand xᵀ of a column-major product."""
    rows, columns = x.shape
    if x.flags.c_contiguous:
        return Matrix(columns, rows, transposed=False)
    return Matrix(rows, columns, transposed=True)
