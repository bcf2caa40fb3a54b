"""Results compared over schedules; bank conflicts and sectors counted as the hardware's rules give them by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cllm_gpu.simulator import KernelError, RawKernel, Traffic, check_schedules, schedules, settings

CUDA = Path(__file__).parents[2] / "cuda"

SUM = r"""
extern "C" __global__ void total(const float* x, float* y) {
    __shared__ float sum;
    if (threadIdx.x == 0) sum = 0.0f;
    __syncthreads();
    atomicAdd(&sum, x[threadIdx.x]);
    __syncthreads();
    if (threadIdx.x == 0) y[0] = sum;
}
"""


def test_schedules_differ() -> None:
    chosen = schedules(20)
    assert len(set(chosen)) == 20
    assert {s.lazy_copies for s in chosen} == {True, False}


def test_a_sum_in_no_fixed_order_is_told() -> None:
    x = np.random.default_rng(0).normal(size=256).astype(np.float32)
    kernel = RawKernel(SUM, "total")

    def run() -> list[np.ndarray]:
        y = np.zeros(1, np.float32)
        kernel((1,), (256,), (x, y))
        return [y]

    with pytest.raises(KernelError, match="result 0 depends on the order of threads: 1 of 1 elements differ"):
        check_schedules(run)
    x[:] = np.arange(256)  # exact in any order
    assert check_schedules(run)[0][0] == 256 * 255 / 2


def _transpose(width: int) -> Traffic:
    source = f"""
    extern "C" __global__ void transpose(const float* x, float* y) {{
        __shared__ float tile[32][{width}];
        for (int r = threadIdx.y; r < 32; r += 8) tile[r][threadIdx.x] = x[32 * r + threadIdx.x];  // line 4
        __syncthreads();
        for (int r = threadIdx.y; r < 32; r += 8) y[32 * r + threadIdx.x] = tile[threadIdx.x][r];  // line 6
    }}"""
    x = np.arange(1024, dtype=np.float32).reshape(32, 32)
    y = np.zeros_like(x)
    kernel = RawKernel(source, "transpose", check=True)
    with settings(count_traffic=True):
        kernel((1,), (32, 8), (x, y))
    np.testing.assert_array_equal(y, x.T)
    assert kernel.last_traffic is not None
    return kernel.last_traffic


def test_bank_conflicts_of_a_transpose() -> None:
    # A column of a tile whose rows are 32 words lies in one bank: 32 passes for each of the 32 rows.
    lines = {(line.place.line, line.shared): line for line in _transpose(32).lines}
    assert (lines[4, True].instructions, lines[4, True].passes, lines[4, True].ideal) == (32, 32, 32)
    assert (lines[6, True].instructions, lines[6, True].passes, lines[6, True].ideal) == (32, 1024, 32)
    # A warp's row of 32 floats is four sectors of 32 bytes.
    assert (lines[4, False].instructions, lines[4, False].passes, lines[4, False].ideal) == (32, 128, 128)
    assert _transpose(32).bank_conflicts == 32 * 31
    assert _transpose(33).bank_conflicts == 0
    assert str(_transpose(32)).split("\n")[-1].split() == ["shared", "32", "1024", "32", "line", "6"]


STRIDES = r"""
#include "common.cuh"
extern "C" __global__ void touch(float* y, int stride) {
    __shared__ __align__(16) float s[32 * 16];
    const int t = threadIdx.x;
    for (int i = t; i < 512; i += 32) s[i] = 1.0f;
    __syncwarp();
    const float4 v = load4(s + (4 * t * stride) % 512);  // line 8
    u32 f[4];
    load_matrix_x4(f, reinterpret_cast<bf16*>(s) + (8 * t * stride) % 1024);  // line 10
    y[t * stride] = v.x + v.y + v.z + v.w + (f[0] ? 1.0f : 0.0f);  // line 11
}
"""


@pytest.mark.parametrize(
    ("stride", "vector_passes", "sectors"),
    [
        (1, 4, 4),  # consecutive 16-byte accesses: one pass for each quarter of a warp
        (2, 8, 8),  # every other one: 8 lanes fall on 16 words' distance, two to a bank
        (8, 32, 32),  # 32 words apart: all eight lanes of a quarter in the same banks
    ],
)
def test_vector_accesses_go_by_quarter_warps(stride: int, vector_passes: int, sectors: int) -> None:
    y = np.zeros(32 * 8, np.float32)
    kernel = RawKernel(STRIDES, "touch", (f"-I{CUDA}",), check=True)
    with settings(count_traffic=True):
        kernel((1,), (32,), (y, np.int32(stride)))
    assert kernel.last_traffic is not None
    by_line = {line.place.line: line for line in kernel.last_traffic.lines if not line.place.file}
    in_header = [line for line in kernel.last_traffic.lines if line.place.file == "common.cuh" and line.shared]
    assert by_line[11].passes == sectors
    passes = sorted(line.passes for line in in_header)
    assert passes == [vector_passes] * 2
