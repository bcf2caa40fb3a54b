"""Variables of a source: constant memory filled from Python, device memory that lasts from launch to launch."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.simulator import KernelError, RawModule
from cllm_gpu.utils.errors import UserError

SOURCE = r"""
struct Pair { int a, b; };
__constant__ float table[8];
__device__ int launches = 5;
extern "C" {
__constant__ __align__(16) Pair pairs[2] = {{1, 2}, {3, 4}};
__device__ __forceinline__ float twice(float x) { return 2.0f * x; }
}
namespace inner { __device__ int hidden; }
__device__ int helper(int x) { return x + inner::hidden; }
extern "C" __global__ void apply(const int* index, float* y, int offset) {
    y[threadIdx.x] = twice(table[index[threadIdx.x] + offset]) + pairs[threadIdx.x % 2].b + helper(0);
    if (threadIdx.x == 0) launches += 1;
}
extern "C" __global__ void everyone() { launches = launches + 1; }
"""


@pytest.mark.parametrize("check", [False, True])
def test_constant_and_device_variables(check: bool) -> None:
    module = RawModule(code=SOURCE, check=check)
    table = np.ndarray(8, np.float32, buffer=module.get_global("table"))
    table[:] = np.arange(8) * 10
    index, y = np.array([3, 1, 7, 0], np.int32), np.zeros(4, np.float32)
    apply = module.get_function("apply")
    launches = np.ndarray((), np.int32, buffer=module.get_global("launches"))
    before = int(launches)
    for _ in range(2):
        apply((1,), (4,), (index, y, 0))
    np.testing.assert_array_equal(y, [62, 24, 142, 4])
    assert int(launches) == before + 2
    with pytest.raises(
        UserError, match="no __device__ or __constant__ variable 'hidden'; it has: table, launches, pairs"
    ):
        module.get_global("hidden")


def test_variables_are_checked() -> None:
    module = RawModule(code=SOURCE, check=True)
    index, y = np.array([3, 1, 7, 0], np.int32), np.zeros(4, np.float32)
    with pytest.raises(KernelError) as caught:
        module.get_function("apply")((1,), (4,), (index, y, 1))
    assert caught.value.kind == "out of range"
    assert caught.value.thread == (2, 0, 0)
    with pytest.raises(KernelError, match="of launches, which thread"):
        module.get_function("everyone")((1,), (64,), ())
