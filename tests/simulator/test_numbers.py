"""bf16, half and integer intrinsics against NumPy's own, and the warp operations against their definitions."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cllm_gpu.simulator import RawKernel, RawModule, Schedule

CUDA = Path(__file__).parents[2] / "cuda"

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "common.cuh"
extern "C" __global__ void round_both(const float* x, __nv_bfloat16* b, __half* h, bf16* own, u32* packed, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    b[i] = __float2bfloat16(x[i]);
    h[i] = __float2half(x[i]);
    own[i] = to_bf16(x[i]);
    packed[i] = pack_bf16(x[i], x[n - 1 - i]);
}
extern "C" __global__ void widen(const __nv_bfloat16* b, const __half* h, float* from_b, float* from_h, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    from_b[i] = __bfloat162float(b[i]);
    from_h[i] = __half2float(h[i]);
}
extern "C" __global__ void integers(const unsigned* x, unsigned* out, int n) {
    const int i = threadIdx.x;
    if (i >= n) return;
    out[6 * i] = __popc(x[i]);
    out[6 * i + 1] = __clz(x[i]);
    out[6 * i + 2] = __ffs(x[i]);
    out[6 * i + 3] = __brev(x[i]);
    out[6 * i + 4] = __umulhi(x[i], 0x9E3779B9u);
    out[6 * i + 5] = __byte_perm(x[i], 0x44332211u, 0x5140);
}
extern "C" __global__ void warp(const int* x, int* out) {
    const unsigned t = threadIdx.x;
    const int v = x[t];
    int k = 0;
    const auto put = [&](int value) { out[16 * t + k++] = value; };
    put(__shfl_sync(0xffffffffu, v, 5));
    put(__shfl_up_sync(0xffffffffu, v, 3));
    put(__shfl_down_sync(0xffffffffu, v, 3));
    put(__shfl_xor_sync(0xffffffffu, v, 9));
    put(__shfl_sync(0xffffffffu, v, 5, 8));
    put(__shfl_up_sync(0xffffffffu, v, 3, 8));
    put(__shfl_down_sync(0xffffffffu, v, 3, 8));
    put(__ballot_sync(0xffffffffu, v > 0));
    put(__any_sync(0xffffffffu, v > 900));
    put(__all_sync(0xffffffffu, v > -900));
    put(__reduce_add_sync(0xffffffffu, v));
    put(__reduce_min_sync(0xffffffffu, v));
    put(__match_any_sync(0xffffffffu, v & 3));
    int active = 0;
    if (t % 3 == 0) active = __activemask();
    put(active);
    put(__syncthreads_count(v > 0));
    put(__syncthreads_or(v == 77) * 2 + __syncthreads_and(v > -900));
}
extern "C" __global__ void atomics(int* counters, unsigned* histogram, float* largest) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&counters[0], i);
    atomicMax(&counters[1], i ^ 37);
    atomicMin(&counters[2], -(i ^ 37));
    atomicOr(&counters[3], 1 << (i % 31));
    atomicInc(&histogram[i % 5], 1000u);
    unsigned* bits = reinterpret_cast<unsigned*>(largest);
    unsigned seen = *reinterpret_cast<volatile unsigned*>(bits), assumed;
    do {
        assumed = seen;
        seen = atomicCAS(bits, assumed, __float_as_uint(fmaxf(__uint_as_float(assumed), float(i % 91))));
    } while (assumed != seen);
}
"""


@pytest.fixture(scope="module")
def module() -> RawModule:
    return RawModule(code=SOURCE, options=(f"-I{CUDA}",))


def _interesting_floats() -> np.ndarray:
    patterns = np.arange(0, 2**32, 65_521, dtype=np.uint64).astype(np.uint32)
    edges = np.array([0, 1e-8, 6e-8, 5.96e-8, 2.98e-8, 65504, 65519.996, 65520, 1.0009765625, 1.00048828125, np.inf])
    values = np.concatenate([patterns.view(np.float32), edges.astype(np.float32), -edges.astype(np.float32)])
    return values[~np.isnan(values)]


def test_rounding_to_two_bytes(module: RawModule) -> None:
    x = _interesting_floats()
    n = x.size
    b, h, own = (np.zeros(n, np.uint16) for _ in range(3))
    packed = np.zeros(n, np.uint32)
    module.get_function("round_both")(((n + 255) // 256,), (256,), (x, b, h, own, packed, n))
    with np.errstate(over="ignore"):
        expected_b, expected_h = x.astype(ml_dtypes.bfloat16).view(np.uint16), x.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(b, expected_b)
    np.testing.assert_array_equal(own, expected_b)
    np.testing.assert_array_equal(h, expected_h)
    np.testing.assert_array_equal(packed, expected_b.astype(np.uint32) | expected_b[::-1].astype(np.uint32) << 16)


def test_widening_every_pattern(module: RawModule) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    from_b, from_h = np.zeros(65536, np.float32), np.zeros(65536, np.float32)
    module.get_function("widen")((256,), (256,), (bits, bits, from_b, from_h, 65536))
    np.testing.assert_array_equal(from_b, bits.view(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(from_h, bits.view(np.float16).astype(np.float32))


def test_integer_intrinsics(module: RawModule) -> None:
    x = np.array([0, 1, 2, 0x80000000, 0xFFFFFFFF, 0x12345678, 0x00F0F000], np.uint32)
    out = np.zeros((x.size, 6), np.uint32)
    module.get_function("integers")((1,), (32,), (x, out, x.size))
    for value, row in zip(map(int, x), out.tolist(), strict=True):
        lowest = (value & -value).bit_length()
        high = (value * 0x9E3779B9) >> 32
        # selector 0x5140 from the low nibble up: byte 0 of x, byte 4 (0x11), byte 1 of x, byte 5 (0x22)
        permuted = value & 0xFF | 0x11 << 8 | (value >> 8 & 0xFF) << 16 | 0x22 << 24
        reversed_bits = int(f"{value:032b}"[::-1], 2)
        assert row == [value.bit_count(), 32 - value.bit_length(), lowest, reversed_bits, high, permuted]


@pytest.mark.parametrize("seed", range(4))
def test_warp_operations(module: RawModule, seed: int) -> None:
    x = np.random.default_rng(11).integers(-100, 101, 64).astype(np.int32)
    x[40] = 77
    out = np.zeros((64, 16), np.int32)
    module.get_function("warp")((1,), (64,), (x, out), schedule=Schedule(seed))
    for t in range(64):
        w, lane = t // 32 * 32, t % 32
        mine = x[w : w + 32]
        eight = lane // 8 * 8
        ballot = sum(1 << i for i in range(32) if mine[i] > 0)
        same = sum(1 << i for i in range(32) if mine[i] & 3 == mine[lane] & 3)
        active = sum(1 << i for i in range(32) if (w + i) % 3 == 0) if t % 3 == 0 else 0
        expected = [
            mine[5],
            mine[lane - 3] if lane >= 3 else mine[lane],
            mine[lane + 3] if lane < 29 else mine[lane],
            mine[lane ^ 9],
            mine[eight + 5],
            mine[lane - 3] if lane - eight >= 3 else mine[lane],
            mine[lane + 3] if lane - eight < 5 else mine[lane],
            ballot,
            0,
            1,
            mine.sum(),
            mine.min(),
            same,
            active,
            int((x > 0).sum()),
            3,
        ]
        np.testing.assert_array_equal(out[t], np.array(expected, np.int64).astype(np.uint32).astype(np.int32))


@pytest.mark.parametrize("check", [False, True])
def test_atomics(check: bool) -> None:
    counters, histogram, largest = np.zeros(4, np.int32), np.zeros(5, np.uint32), np.zeros(1, np.float32)
    kernel = RawKernel(SOURCE.replace("volatile unsigned", "unsigned"), "atomics", (f"-I{CUDA}",), check=False)
    kernel((3,), (96,), (counters, histogram, largest), schedule=Schedule(3))
    i = np.arange(288)
    assert counters.tolist() == [i.sum(), (i ^ 37).max(), -(i ^ 37).max(), 2**31 - 1]
    np.testing.assert_array_equal(histogram, np.bincount(i % 5))
    assert largest[0] == 90
