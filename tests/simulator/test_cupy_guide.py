"""The cases of the "Raw kernels" and "Raw modules" chapters of CuPy's user guide, with the results it prints.

The calls and the printed results are the guide's; the kernels are written here to the same description. Set
CLLM_CUPY_GUIDE to a copy of CuPy's docs/source/user_guide/kernel.rst to run the guide's own text as well.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cllm_gpu.simulator import RawKernel, RawModule
from cllm_gpu.utils.errors import UserError

ADD = r"""
extern "C" __global__ void my_add(const float* x1, const float* x2, float* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x1[i] + x2[i];
}
"""


@pytest.mark.parametrize("check", [False, True])
def test_vector_add(check: bool) -> None:
    x1 = np.arange(25, dtype=np.float32).reshape(5, 5)
    x2 = np.arange(25, dtype=np.float32).reshape(5, 5)
    y = np.zeros((5, 5), dtype=np.float32)
    RawKernel(ADD, "my_add", check=check)((5,), (5,), (x1, x2, y))
    np.testing.assert_array_equal(y, 2 * np.arange(25).reshape(5, 5))


def test_complex_numbers() -> None:
    source = r"""
    #include <cupy/complex.cuh>
    extern "C" __global__ void my_func(const complex<float>* x1, const complex<float>* x2, complex<float>* y, float a) {
        const int i = blockIdx.x * blockDim.x + threadIdx.x;
        y[i] = x1[i] + a * x2[i];
    }
    """
    x1 = np.arange(25, dtype=np.complex64).reshape(5, 5)
    x2 = 1j * x1
    y = np.zeros_like(x1)
    RawKernel(source, "my_func")((5,), (5,), (x1, x2, y, np.float32(2.0)))
    np.testing.assert_array_equal(y, np.arange(25).reshape(5, 5) * (1 + 2j))


def test_two_kernels_of_a_module_and_a_python_int() -> None:
    source = r"""
    extern "C" {
    __global__ void test_sum(const float* x1, const float* x2, float* y, unsigned int N) {
        const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < N) y[i] = x1[i] + x2[i];
    }
    __global__ void test_multiply(const float* x1, const float* x2, float* y, unsigned int N) {
        const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < N) y[i] = x1[i] * x2[i];
    }
    }
    """
    module = RawModule(code=source)
    N = 10
    x1 = np.arange(N**2, dtype=np.float32).reshape(N, N)
    x2 = np.full((N, N), 3, dtype=np.float32)
    y = np.zeros((N, N), dtype=np.float32)
    module.get_function("test_sum")((N,), (N,), (x1, x2, y, N**2))
    np.testing.assert_array_equal(y, x1 + x2)
    module.get_function("test_multiply")((N,), (N,), (x1, x2, y, N**2))
    np.testing.assert_array_equal(y, x1 * x2)


def test_templates_by_name_expression() -> None:
    source = r"""
    template <typename T>
    __global__ void fx3(T* arr, int N) {
        const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < N) arr[i] = arr[i] * 3;
    }
    """
    names = ["fx3<float>", "fx3<double>"]
    module = RawModule(code=source, options=("-std=c++11",), name_expressions=names)
    for name, dtype in zip(names, (np.float32, np.float64), strict=True):
        a = np.arange(10, dtype=dtype)
        module.get_function(name)((1,), (10,), (a, 10))
        np.testing.assert_array_equal(a, [0, 3, 6, 9, 12, 15, 18, 21, 24, 27])


def test_a_struct_by_value() -> None:
    source = r"""
    __device__ double3 operator+(const double3& a, const double3& b) {
        return make_double3(a.x + b.x, a.y + b.y, a.z + b.z);
    }
    extern "C" __global__ void shift(const double3* points, double3 by, double3* moved) {
        moved[threadIdx.x] = points[threadIdx.x] + by;
    }
    """
    double3 = np.dtype({"names": ["x", "y", "z"], "formats": [np.float64] * 3})
    points = np.arange(24, dtype=np.float64).reshape(8, 3)
    by = np.array([1.0, 2.0, 3.0])
    moved = np.empty_like(points)
    RawKernel(source, "shift")((1,), (8,), (points, by.view(double3), moved))
    np.testing.assert_array_equal(moved, points + by)


@pytest.mark.parametrize("check", [False, True])
def test_tiled_matrix_product(check: bool) -> None:
    source = r"""
    #define TILE 16
    extern "C" __global__ void product(const float* A, const float* B, float* C, int M, int N, int K) {
        __shared__ float a[TILE][TILE + 1], b[TILE][TILE + 1];
        const int row = blockIdx.y * TILE + threadIdx.y, column = blockIdx.x * TILE + threadIdx.x;
        float sum = 0.0f;
        for (int k = 0; k < K; k += TILE) {
            const int ka = k + threadIdx.x, kb = k + threadIdx.y;
            a[threadIdx.y][threadIdx.x] = row < M && ka < K ? A[row * K + ka] : 0.0f;
            b[threadIdx.y][threadIdx.x] = kb < K && column < N ? B[kb * N + column] : 0.0f;
            __syncthreads();
            #pragma unroll
            for (int i = 0; i < TILE; ++i) sum += a[threadIdx.y][i] * b[i][threadIdx.x];
            __syncthreads();
        }
        if (row < M && column < N) C[row * N + column] = sum;
    }
    """
    M, N, K = 37, 50, 23
    A = np.arange(M * K, dtype=np.float32).reshape(M, K) % 7
    B = np.arange(K * N, dtype=np.float32).reshape(K, N) % 5
    C = np.full((M, N), np.nan, np.float32)
    kernel = RawKernel(source, "product", check=check)
    kernel((4, 3), (16, 16), (A, B, C, np.int32(M), np.int32(N), np.int32(K)))
    np.testing.assert_array_equal(C, A @ B)  # small integers: exact in float32


def test_attributes() -> None:
    kernel = RawKernel(ADD, "my_add")
    assert kernel.max_dynamic_shared_size_bytes == 49152
    kernel.max_dynamic_shared_size_bytes = 50000
    assert kernel.attributes["max_dynamic_shared_size_bytes"] == 50000
    with pytest.raises(UserError, match="from 0 to 232448"):
        kernel.max_dynamic_shared_size_bytes = 2**20


@contextlib.contextmanager
def _numpy_as_cupy() -> Iterator[types.ModuleType]:
    stand_in = types.ModuleType("cupy")
    stand_in.__dict__.update({name: getattr(np, name) for name in np.__all__ if name != "bool8"})
    stand_in.__dict__.update(RawKernel=RawKernel, RawModule=RawModule)
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = stand_in
    try:
        yield stand_in
    finally:
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before


@pytest.mark.skipif("CLLM_CUPY_GUIDE" not in os.environ, reason="CLLM_CUPY_GUIDE names no copy of CuPy's user guide")
def test_the_guides_own_text() -> None:
    text = Path(os.environ["CLLM_CUPY_GUIDE"]).read_text(encoding="utf-8")
    chapters = text[text.index("\nRaw kernels\n") : text.index("\nKernel fusion\n")]
    with _numpy_as_cupy() as cupy:
        names = {"cp": cupy, "cupy": cupy, "np": np}
        examples = doctest.DocTestParser().get_doctest(chapters, names, "user guide", None, 0)
        output = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        failed, attempted = runner.run(examples, out=output.write)
    assert attempted > 30
    assert failed == 0, output.getvalue()
