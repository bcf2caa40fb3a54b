"""Kernels that use the basic machinery give the right numbers: indices, shared memory, barriers, shuffles."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cllm_gpu.simulator import RawKernel, RawModule, Schedule

SOURCE = r"""
extern "C" __global__ void add(const float* a, const float* b, float* c, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = a[i] + b[i];
}

template <int WARPS>
__device__ int block_sum(int v) {
    __shared__ int part[WARPS];
    for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    v = threadIdx.x < WARPS ? part[threadIdx.x] : 0;
    if (threadIdx.x < 32)
        for (int offset = 16; offset; offset >>= 1) v += __shfl_down_sync(0xffffffffu, v, offset);
    return v;
}

extern "C" __global__ void __launch_bounds__(256) sum(const int* a, int* out, int n) {
    extern __shared__ int reversed[];
    int v = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) v += a[i];
    reversed[blockDim.x - 1 - threadIdx.x] = v;
    __syncthreads();
    v = block_sum<8>(reversed[threadIdx.x]);
    if (threadIdx.x == 0) *out = v;
}
"""


def test_vector_add_with_a_ragged_end() -> None:
    a = np.linspace(-1, 1, 1000, dtype=np.float32)
    b = np.linspace(3, 5, 1000, dtype=np.float32)
    c = np.full_like(a, np.nan)
    RawKernel(SOURCE, "add")((4,), (256,), (a, b, c, 1000))
    np.testing.assert_array_equal(c, a + b)


@pytest.mark.parametrize("seed", range(20))
def test_shared_memory_reduction_under_any_order_of_threads(seed: int) -> None:
    a = np.arange(-300, 700, dtype=np.int32)
    out = np.zeros(1, np.int32)
    kernel = RawModule(code=SOURCE).get_function("sum")
    kernel((1,), (256,), (a, out, a.size), shared_mem=256 * 4, schedule=Schedule(seed))
    assert out[0] == a.sum()


def test_launches_from_several_python_threads() -> None:
    kernel = RawModule(code=SOURCE).get_function("sum")

    def total(start: int) -> bool:
        a = np.arange(start, start + 5000, dtype=np.int32)
        out = np.zeros(1, np.int32)
        for _ in range(20):
            kernel((1,), (256,), (a, out, a.size), shared_mem=256 * 4)
        return bool(out[0] == a.sum())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(total, range(8)))
