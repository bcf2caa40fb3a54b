"""Every function of common.cuh: right values here, and accepted by NVRTC for each architecture."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from bench.compiled.nvrtc import compile_kernels, load_nvrtc
from cllm_gpu.ops.cuda.kernel_source import source_directory
from cllm_gpu.simulator import RawModule, Schedule

SOURCE = r"""
#include "common.cuh"
extern "C" __global__ void reductions(const float* x, float* y) {
    __shared__ float scratch[4];
    const int t = threadIdx.x;
    const float total = block_sum<4>(x[t], scratch), largest = block_max<4>(x[t], scratch);
    const float square = block_sum<4>(x[t] * x[t], scratch);  // after either the scratch is free at once
    y[5 * t] = total, y[5 * t + 1] = largest, y[5 * t + 2] = warp_sum(x[t]), y[5 * t + 3] = warp_max(x[t]);
    y[5 * t + 4] = square;
}
extern "C" __global__ void vectors(const bf16* b, const float* f, bf16* b_out, float* f_out, bf16* b8) {
    const int t = threadIdx.x;
    store_float4(f_out + 4 * t, load_float4(b + 4 * t));
    store_float4(b_out + 4 * t, load_float4(f + 4 * t));
    if (t < 16) store8(b8 + 8 * t, load8(b + 8 * t));
    const float2 pair = unpack_bf16(pack_bf16(f[4 * t], f[4 * t + 1]));
    f_out[128 + 2 * t] = pair.x + to_float(from_float<bf16>(f[4 * t]));
    f_out[128 + 2 * t + 1] = pair.y + to_float(from_float<float>(f[4 * t]));
}
extern "C" __global__ void copies(const float* x, float* y, int n) {
    __shared__ __align__(16) float wide[128];
    __shared__ float narrow[32];
    const int t = threadIdx.x;
    copy_async_16(wide + 4 * t, x + 4 * t, 4 * t < n);
    copy_async_commit();
    copy_async_4(narrow + t, x + t, t < n);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    for (int i = t; i < 128; i += 32) y[i] = wide[i];
    copy_async_wait<0>();
    __syncthreads();
    y[128 + t] = narrow[t];
}
extern "C" __global__ void functions(const float* x, float* y) {
    const int t = threadIdx.x;
    y[t] = exp2_approx(x[t]), y[32 + t] = sqrt_approx(fabsf(x[t]));
    y[64 + t] = reciprocal_approx(x[t]), y[96 + t] = tanh_approx(x[t]);
    y[128 + t] = float_of_bits(bits_of_float(x[t])), y[160 + t] = exp2_approx(-INFINITY_F);
}
extern "C" __global__ void tensor(const bf16* x, float* y) {
    __shared__ __align__(16) bf16 s[256];
    for (int i = threadIdx.x; i < 256; i += 32) s[i] = x[i];
    __syncthreads();
    u32 a[4], b[4];
    load_matrix_x4(a, s + 8 * threadIdx.x);
    load_matrix_x4_trans(b, s + 8 * threadIdx.x);
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_bf16(d, a, b[0], b[1]);
    store4(y + 4 * threadIdx.x, make_float4(d[0], d[1], d[2], d[3]));
}
"""


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "checked"])
def module(request: pytest.FixtureRequest) -> RawModule:
    return RawModule(code=SOURCE, options=(f"-I{source_directory()}",), check=request.param)


def test_reductions(module: RawModule) -> None:
    x = np.random.default_rng(0).integers(-50, 51, 128).astype(np.float32)
    y = np.zeros((128, 5), np.float32)
    module.get_function("reductions")((1,), (128,), (x, y), schedule=Schedule(3))
    warps = x.reshape(4, 32)
    expected = np.stack(
        [
            np.full(128, x.sum()),
            np.full(128, x.max()),
            np.repeat(warps.sum(axis=1), 32),
            np.repeat(warps.max(axis=1), 32),
            np.full(128, (x * x).sum()),
        ],
        axis=1,
    )
    np.testing.assert_array_equal(y, expected)  # small integers: exact in any order


def test_vector_accesses(module: RawModule) -> None:
    b = np.linspace(-3, 3, 128).astype(ml_dtypes.bfloat16)
    f = np.linspace(-7, 5, 128).astype(np.float32)
    b_out, b8, f_out = np.zeros_like(b), np.zeros_like(b), np.zeros(192, np.float32)
    module.get_function("vectors")((1,), (32,), (b, f, b_out, f_out, b8))
    rounded = f.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(f_out[:128], b.astype(np.float32))
    np.testing.assert_array_equal(b_out.view(np.uint16), rounded.view(np.uint16))
    np.testing.assert_array_equal(b8.view(np.uint16), b.view(np.uint16))
    wide = rounded.astype(np.float32).reshape(32, 4)
    np.testing.assert_array_equal(f_out[128::2], 2 * wide[:, 0])
    np.testing.assert_array_equal(f_out[129::2], wide[:, 1] + f.reshape(32, 4)[:, 0])


@pytest.mark.parametrize("lazy", [False, True])
def test_copies_fill_with_zeros_and_read_nothing_there(module: RawModule, lazy: bool) -> None:
    x = np.arange(1, 21, dtype=np.float32)
    y = np.full(160, np.nan, np.float32)
    module.get_function("copies")((1,), (32,), (x, y, 20), schedule=Schedule(1, lazy_copies=lazy))
    np.testing.assert_array_equal(y[:20], x)
    np.testing.assert_array_equal(y[20:128], 0)
    np.testing.assert_array_equal(y[128:], np.pad(x, (0, 12)))


def test_approximate_functions(module: RawModule) -> None:
    x = np.linspace(-4, 4, 32, dtype=np.float32)
    x[0] = -np.inf
    x[1] = -140.0  # a subnormal result, flushed
    x[2] = -126.0  # the smallest that is not
    y = np.zeros((6, 32), np.float32)
    module.get_function("functions")((1,), (32,), (x, y))
    exact = np.exp2(x.astype(np.float64))
    exact[1] = 0.0
    for got, want in zip(y, (exact, np.sqrt(abs(x)), 1 / x, np.tanh(x), x, np.zeros(32)), strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-7)  # the host's functions: two or three roundings


def test_tensor_core_on_the_identity(module: RawModule) -> None:
    x = np.zeros((4, 8, 8), np.float32)
    x[0] = x[3] = np.eye(8)  # A = [[M0, M2], [M1, M3]] is the identity
    y = np.zeros((32, 4), np.float32)
    module.get_function("tensor")((1,), (32,), (x.astype(ml_dtypes.bfloat16), y))
    product = np.zeros((16, 8), np.float32)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        product[row, column : column + 2], product[row + 8, column : column + 2] = y[lane, :2], y[lane, 2:]
    # B is M0 and M1 read by columns and taken as columns: itself, so D = A·[M0; M1] = [1; 0]
    np.testing.assert_array_equal(product, np.vstack([np.eye(8), np.zeros((8, 8))]))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_nvrtc_takes_all_of_it(architecture: str) -> None:
    if load_nvrtc() is None:
        pytest.skip("not run: NVRTC is not installed (pip install nvidia-cuda-nvrtc-cu12)")
    found = compile_kernels(SOURCE, "common_test.cu", (f"-I{source_directory()}", "-std=c++17"), architecture)
    assert {resources.kernel for resources in found} == {"reductions", "vectors", "copies", "functions", "tensor"}
