"""The ways in which CUDA sources write shared variables and kernels, all of them read rightly."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.simulator import RawModule
from cllm_gpu.simulator.source import find_kernels, find_variables
from cllm_gpu.utils.errors import UserError

SOURCE = r"""
extern __shared__ __align__(16) unsigned char raw[];
typedef float f32;
#define SMEM __shared__
enum { N = 4 };

template <typename T, int R>
__device__ T pick(T x) {
    __shared__ T a[R], b[R][2];
    __shared__ union { float f; unsigned u; } both;
    if (threadIdx.x == 0) {
        for (int i = 0; i < R; i++) a[i] = x, b[i][1] = x;
        both.f = 1.0f;
    }
    __syncthreads();
    T r = a[R - 1] + b[0][1] + (both.u == 0x3f800000u);
    __syncthreads();
    return r;
}

__global__ void declared_only(int*);

extern "C" {
__global__ __launch_bounds__(64, 2) void forms(f32 *__restrict__ y, const int n)
{
    SMEM int counter;
    if (threadIdx.x == 0) counter = 0;
    __syncthreads();
    atomicAdd(&counter, 1);
    __syncthreads();
    float* d = reinterpret_cast<float*>(raw);
    d[threadIdx.x] = pick<float, 3>(1.0f) + pick<int, N>(2);
    __syncthreads();
    if (threadIdx.x < n) y[threadIdx.x] = d[threadIdx.x ^ 1] + counter;
}
}

extern "C" __global__ void rows(float (*y)[2]) {
    extern volatile __shared__ float two[][2];
    two[threadIdx.x][1] = 3 + threadIdx.x;
    y[threadIdx.x][0] = two[threadIdx.x][1];
    assert(threadIdx.x < 2);
}
"""


@pytest.mark.parametrize("check", [False, True])
def test_forms_of_shared_variables(check: bool) -> None:
    module = RawModule(code=SOURCE, check=check)
    y = np.zeros(64, np.float32)
    module.get_function("forms")((1,), (64,), (y, 64), shared_mem=256)
    np.testing.assert_array_equal(y, 64 + 3 + 5)  # the count, 1 + 1 + 1 and 2 + 2 + 1
    z = np.zeros((2, 2), np.float32)
    module.get_function("rows")((1,), (2,), (z,), shared_mem=16)
    np.testing.assert_array_equal(z, [[3, 0], [4, 0]])


def test_an_initialised_shared_variable_is_refused() -> None:
    source = 'extern "C" __global__ void k(int* y) { __shared__ int s = 3; y[0] = s; }'
    with pytest.raises(UserError, match="does not allow an initialiser on the shared variable 's'"):
        RawModule(code=source).compile()


def test_kernels_and_variables_are_found() -> None:
    found = find_kernels(SOURCE.replace("__launch_bounds__(64, 2)", ""))  # a macro, gone by then
    assert [(k.name, k.parameters, k.is_extern_c) for k in found] == [
        ("forms", ("y", "n"), True),
        ("rows", ("y",), True),
    ]
    text = (
        "template <class T> __global__ void t(T*, int n = 3) {}\n__device__ int a[3], f(int);\n__constant__ float b{2};"
    )
    (kernel,) = find_kernels(text)
    assert kernel.is_template
    assert kernel.parameters == ("argument 1", "n")
    assert find_variables(text) == ["a", "b"]
