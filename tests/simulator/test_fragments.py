"""Which lane holds what: fragments of ldmatrix and mma.sync against tables written down from the PTX ISA.

The tables (sections "Matrix Fragments for mma.m16n8k16" and "ldmatrix") list, for each register of each lane, the row
and column it holds, spelled out rather than computed by the formula the simulator uses.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cllm_gpu.simulator import RawModule

CUDA = Path(__file__).parents[2] / "cuda"

SOURCE = r"""
#include "common.cuh"
extern "C" __global__ void load(const bf16* matrices, u32* fragments, int transposed) {
    __shared__ __align__(16) bf16 s[4 * 8 * 8];
    for (int i = threadIdx.x; i < 256; i += 32) s[i] = matrices[i];
    __syncwarp();
    u32 f[4];
    if (transposed) load_matrix_x4_trans(f, s + 8 * threadIdx.x);
    else load_matrix_x4(f, s + 8 * threadIdx.x);
    for (int j = 0; j < 4; ++j) fragments[4 * threadIdx.x + j] = f[j];
}
extern "C" __global__ void multiply(const u32* a, const u32* b, float* d) {
    u32 fa[4];
    float fd[4];
    for (int j = 0; j < 4; ++j) fa[j] = a[4 * threadIdx.x + j], fd[j] = d[4 * threadIdx.x + j];
    mma_bf16(fd, fa, b[2 * threadIdx.x], b[2 * threadIdx.x + 1]);
    for (int j = 0; j < 4; ++j) d[4 * threadIdx.x + j] = fd[j];
}
"""

# Row of the matrix held by lane 0, 1, 2, … in the figures of the PTX ISA: four lanes to a row.
ROW = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7)
# First of the two columns held by the lanes of a row.
COLUMN = (0, 2, 4, 6)
# (row offset, column offset) of the eight elements a0…a7 of A, two to a register.
A_ELEMENTS = ((0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9), (8, 8), (8, 9))
# B is held with rows and columns exchanged: (row offset, column offset) of b0…b3.
B_ELEMENTS = ((0, 0), (1, 0), (8, 0), (9, 0))
# c0…c3.
C_ELEMENTS = ((0, 0), (0, 1), (8, 0), (8, 1))


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    """Upper halves of floats that have no lower half."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not np.any(bits & 0xFFFF)
    return (bits >> 16).astype(np.uint16)


@pytest.fixture(scope="module")
def module() -> RawModule:
    return RawModule(code=SOURCE, options=(f"-I{CUDA}",), check=True)


@pytest.mark.parametrize("transposed", [0, 1])
def test_matrix_load(module: RawModule, transposed: int) -> None:
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    fragments = np.zeros((32, 4), np.uint32)
    module.get_function("load")((1,), (32,), (matrices, fragments, np.int32(transposed)))
    for lane in range(32):
        row, column = ROW[lane], COLUMN[lane % 4]
        for j in range(4):
            seen = matrices[j].T if transposed else matrices[j]
            low, high = int(seen[row, column]), int(seen[row, column + 1])
            assert fragments[lane, j] == low | high << 16, (lane, j)


def _elements(matrix: np.ndarray, table: tuple[tuple[int, int], ...], exchanged: bool) -> np.ndarray:
    """The elements each lane holds, (32, len(table))."""
    held = np.zeros((32, len(table)), matrix.dtype)
    for lane in range(32):
        row, column = ROW[lane], COLUMN[lane % 4]
        if exchanged:
            row, column = column, row
        for e, (down, right) in enumerate(table):
            held[lane, e] = matrix[row + down, column + right]
    return held


def test_matrix_product(module: RawModule) -> None:
    random = np.random.default_rng(7)
    A, B = random.integers(-8, 9, (16, 16)).astype(np.float32), random.integers(-8, 9, (16, 8)).astype(np.float32)
    C = random.integers(-8, 9, (16, 8)).astype(np.float32)
    a = np.ascontiguousarray(_elements(_bf16_bits(A), A_ELEMENTS, False)).view(np.uint32)
    b = np.ascontiguousarray(_elements(_bf16_bits(B), B_ELEMENTS, True)).view(np.uint32)
    d = _elements(C, C_ELEMENTS, False)
    module.get_function("multiply")((1,), (32,), (a, b, d))
    expected = _elements(A @ B + C, C_ELEMENTS, False)  # small integers: exact in any order of summation
    np.testing.assert_array_equal(d, expected)


def test_each_element_of_a_and_b_reaches_its_products_only(module: RawModule) -> None:
    """One element of A and one of B at a time: D has exactly the element they meet in, or none."""
    multiply = module.get_function("multiply")
    for i, k in ((0, 0), (3, 5), (8, 9), (15, 15), (7, 8), (11, 2)):
        for k_other, j in ((k, 0), (k, 7), (k, 3), ((k + 1) % 16, 3)):
            A, B = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
            A[i, k], B[k_other, j] = 3.0, 5.0
            a = np.ascontiguousarray(_elements(_bf16_bits(A), A_ELEMENTS, False)).view(np.uint32)
            b = np.ascontiguousarray(_elements(_bf16_bits(B), B_ELEMENTS, True)).view(np.uint32)
            d = np.zeros((32, 4), np.float32)
            multiply((1,), (32,), (a, b, d))
            np.testing.assert_array_equal(d, _elements(A @ B, C_ELEMENTS, False))
