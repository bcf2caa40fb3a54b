// Rotary position embedding on pairs (m, m + D/2) of head dimensions, in place.
//
//   (a, b) → (a·cos − b·s, a·s + b·cos),  s = direction·sin: direction 1 forward, −1 backward (the inverse rotation)
//
// x (B, T, H, D) real, strided by batch, row and head, its last axis contiguous; cosine, sine (T, D/2): `table`, which
// is float, or real with -DCLLM_REAL_TABLE. Work: a thread takes one pair; 256 threads a block.
// Traffic per element: 1 read, 1 write; the tables are shared by all heads and stay in the caches.
// Deterministic. Source: Su et al. 2021, "RoFormer".
// Resources, the most over all variants and sm_80, sm_90, sm_100 (bench/kernel_resources.py writes this table):
//   kernel                                     registers  shared  spilled
//   rotary_bfloat16                                   28       0        0
//   rotary_float32                                    28       0        0
#include "storage.cuh"

#ifdef CLLM_REAL_TABLE
typedef real table;
#else
typedef float table;
#endif

extern "C" __global__ void __launch_bounds__(256) ENTRY(rotary)(
    real* x, const table* cosine, const table* sine, long long batch_stride, long long row_stride,
    long long head_stride, long long pairs, int length, int heads, int half, float direction) {
    const index_t i = index_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= pairs) return;
    const int m = int(i % half), head = int(i / half % heads);
    const index_t row = i / half / heads;  // over batch and position
    const int position = int(row % length);
    real* const first = x + row / length * batch_stride + position * row_stride + head * head_stride + m;
    real* const second = first + half;
    const float c = to_float(cosine[index_t(position) * half + m]);
    const float s = direction * to_float(sine[index_t(position) * half + m]);
    const float a = to_float(*first), b = to_float(*second);
    store(first, a * c - b * s);
    store(second, a * s + b * c);
}
