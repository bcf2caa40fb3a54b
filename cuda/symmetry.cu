// The lattice's symmetry on consecutive pairs (2m, 2m + 1) of head dimensions, in place.
//
//   forward   (a, b) → (c·a − s·σb, s·a + c·σb)
//   backward  (a, b) → (c·a + s·b, σ(c·b − s·a)),  its transpose
//   c, s = cosine, sine[e][m] and σ = sign[e] of the token's element e
//
// x (B, T, H, D) real, strided by batch, row and head, its last axis contiguous; elements (B, T) int32 in 0 … 23; cosine,
// sine (24, pairs), sign (24) fp32; the dimensions from 2·pairs on are not touched. Work: a thread takes one pair; 256
// threads a block. Traffic per element: 1 read, 1 write; the tables stay in the caches. Deterministic.
// Resources, the most over all variants and sm_80, sm_90, sm_100 (bench/kernel_resources.py writes this table):
//   kernel                                     registers  shared  spilled
//   symmetry_bfloat16                                 26       0        0
//   symmetry_float32                                  26       0        0
#include "storage.cuh"

extern "C" __global__ void __launch_bounds__(256) ENTRY(symmetry)(
    real* x, const int* elements, const float* cosine, const float* sine, const float* sign, long long batch_stride,
    long long row_stride, long long head_stride, long long count, int length, int heads, int pairs, int transposed) {
    const index_t i = index_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int m = int(i % pairs), head = int(i / pairs % heads);
    const index_t row = i / pairs / heads;  // over batch and position
    real* const pair = x + row / length * batch_stride + row % length * row_stride + head * head_stride + 2 * m;
    const int element = elements[row];
    const float c = cosine[element * pairs + m], s = sine[element * pairs + m], reflection = sign[element];
    const float a = to_float(pair[0]), b = to_float(pair[1]);
    if (transposed) {
        store(pair, c * a + s * b);
        store(pair + 1, reflection * (c * b - s * a));
    } else {
        const float y = reflection * b;
        store(pair, c * a - s * y);
        store(pair + 1, s * a + c * y);
    }
}
