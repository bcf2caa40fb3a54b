// Rotary position embedding on pairs (m, m + D/2) of head dimensions, in place.
//
//   (a, b) → (a·cos − b·s, a·s + b·cos),  s = direction·sin: direction 1 forward, −1 backward (the inverse rotation)
//
// x (B, T, H, D) real, strided by batch, row and head, its last axis contiguous; cosine, sine (T, D/2): `table`, which
// is float, or real with -DCLLM_REAL_TABLE. Work: a thread takes one pair; 256 threads a block.
// Traffic per element: 1 read, 1 write; the tables are shared by all heads and stay in the caches.
// With the lattice's symmetry (symmetry.cuh) S(e) comes before the rotation, and its transpose after the rotation back;
// tokens are those of the last `length` of `positions`. A block then takes whole heads: a pair's results need up to
// eight elements (most of them in the caches), so all are read before a barrier and written after it.
// Deterministic. Source: Su et al. 2021, "RoFormer".
#include "symmetry.cuh"

#ifdef CLLM_REAL_TABLE
typedef real table;
#else
typedef float table;
#endif

// One head of one position, as it was before anything is written. `s` of the tables is multiplied by `direction`.
struct Head {
    const real* x;
    const table *cosine, *sine;  // (D/2) of its position
    int half;
    float direction;
    Symmetry::Element element;

    __device__ __forceinline__ float rotated(int d) const {
        const int m = d < half ? d : d - half;
        const float c = to_float(cosine[m]), s = direction * to_float(sine[m]);
        const float a = to_float(x[m]), b = to_float(x[m + half]);
        return d < half ? a * c - b * s : a * s + b * c;
    }
    __device__ __forceinline__ float turned(int d) const {
        if (d >= 2 * PAIRS) return to_float(x[d]);
        float a = to_float(x[d / 2 * 2]), b = to_float(x[d / 2 * 2 + 1]);
        turn(a, b, element, d / 2);
        return d % 2 == 0 ? a : b;
    }
    __device__ __forceinline__ float rotated_turned_back(int d) const {
        if (d >= 2 * PAIRS) return rotated(d);
        float a = rotated(d / 2 * 2), b = rotated(d / 2 * 2 + 1);
        turn_back(a, b, element, d / 2);
        return d % 2 == 0 ? a : b;
    }
};

// Dimensions m and m + D/2 of a head, in place; every thread of the block, all threads of a head in one block.
__device__ __forceinline__ void rotate_with_symmetry(const Head& head, real* first, int m, bool valid) {
    float a = 0.0f, b = 0.0f;
    if (valid && head.direction > 0.0f) {
        const float u = head.turned(m), v = head.turned(m + head.half);
        const float c = to_float(head.cosine[m]), s = to_float(head.sine[m]);
        a = u * c - v * s;
        b = u * s + v * c;
    } else if (valid) {
        a = head.rotated_turned_back(m);
        b = head.rotated_turned_back(m + head.half);
    }
    __syncthreads();
    if (valid) {
        store(first, a);
        store(first + head.half, b);
    }
}

struct RotaryParams {
    real* x;
    const table *cosine, *sine;
    long long batch_stride, row_stride, head_stride, pairs;
    int length, heads, half, positions;
    float direction;
    SymmetryInputs symmetry;
};

extern "C" __global__ void __launch_bounds__(256) ENTRY(rotary)(
    const __grid_constant__ RotaryParams params) {
    const int length = params.length, heads = params.heads, half = params.half;
    if constexpr (SYMMETRY) {
        const int of_block = blockDim.x / half, m = threadIdx.x % half;
        const index_t i = index_t(blockIdx.x) * of_block + threadIdx.x / half, row = i / heads;  // i: the head's number
        const bool valid = threadIdx.x / half < of_block && i * half < params.pairs;
        const int position = int(row % length), batch = valid ? int(row / length) : 0;
        const Symmetry symmetry(params.symmetry, params.positions, batch);
        real* const vector = params.x + row / length * params.batch_stride + position * params.row_stride +
                             i % heads * params.head_stride;
        const index_t at = index_t(position) * half;
        const Symmetry::Element element = symmetry.element(params.positions - length + position);
        rotate_with_symmetry({vector, params.cosine + at, params.sine + at, half, params.direction, element},
                             vector + m, m, valid);
    }
    const index_t i = index_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (SYMMETRY || i >= params.pairs) return;
    const int m = int(i % half), head = int(i / half % heads);
    const index_t row = i / half / heads;  // over batch and position
    const int position = int(row % length);
    real* const first = params.x + row / length * params.batch_stride + position * params.row_stride +
                        head * params.head_stride + m;
    real* const second = first + half;
    const float c = to_float(params.cosine[index_t(position) * half + m]);
    const float s = params.direction * to_float(params.sine[index_t(position) * half + m]);
    const float a = to_float(*first), b = to_float(*second);
    store(first, a * c - b * s);
    store(second, a * s + b * c);
}
