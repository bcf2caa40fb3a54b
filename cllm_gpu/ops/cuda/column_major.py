"""Row-major arrays as cuBLAS and cuBLASLt see them, both column-major.

The memory of a row-major (R, C) array is that of a column-major (C, R) matrix of leading dimension C: its transpose. So
row-major out (M, N) = a (M, K) · b (K, N) is asked for as column-major outᵀ (N, M) = bᵀ (N, K) · aᵀ (K, M): b is their
first operand, a their second, N their rows, M their columns. An array that is itself the transpose of a row-major one
(a weight's `.T`) is given as it lies in memory and marked to be transposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# cudaDataType_t and cublasComputeType_t, by value as in library_types.h and cublas_api.h
CUDA_TYPES = {"float32": 0, "bfloat16": 14}
COMPUTE_32F, COMPUTE_32F_FAST_TF32 = 68, 77


@dataclass(frozen=True)
class Matrix:
    """A two-dimensional array as a column-major matrix in memory, and whether the product takes its transpose."""

    rows: int
    columns: int
    transposed: bool

    @property
    def leading(self) -> int:
        """Elements from one column to the next."""
        return max(1, self.rows)


def column_major(x: Any) -> Matrix:
    """x (R, C), or the transpose of such an array, as the factor op(matrix) = xᵀ of a column-major product."""
    rows, columns = x.shape
    if x.flags.c_contiguous:
        return Matrix(columns, rows, transposed=False)
    return Matrix(rows, columns, transposed=True)
