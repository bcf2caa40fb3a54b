// Adam and AdamW, SGD with momentum, and the sum of squares, on flat buffers.
//
//   g = scale·clip·gradient (+ decay·p, Adam)      clip: a device scalar, or 1 where its pointer is null
//   m = β1·m + (1 − β1)·g,   v = β2·v + (1 − β2)·g²
//   update = step_size·m / (√(v·inverse_correction2) + ε) (+ rate·decay·p, AdamW);   p −= update
//   SGD: g = scale·clip·gradient + decay·p,  u = momentum·u + g,  p −= rate·u
//
// parameters, moments (n) fp32 (the master weights in bf16 training); gradients (n) gradient; copy (n) real or null gets
// the rounded parameters. With -DCLLM_WITHOUT_MASTERS the parameters are not used: the copy itself is what is stepped, in
// fp32, and rounded stochastically by Philox words at (element / 4, step, 2^32 - 1), elements counting from `first`,
// key `seed`, as in cllm_gpu/ops/reference/rounding.py. The first `decayed` elements have weight decay. skip: null, or an
// int that when not 0 makes the kernel write nothing. zero_gradients: the gradients are zeroed in the same pass.
// numbers (3) fp32, step (1): what changes from step to step is read from the device (step_numbers.cuh).
// moved (blocks) fp64 or null: Σ update² per block, added up by sum_finish in a fixed order.
// Work: a thread takes 4 neighbouring elements, blocks stride over the buffer. Traffic per parameter: 28 bytes fp32
//   (read p, g, m, v; write p, m, v), 28 with bf16 gradients and copy (30 when zeroing), 22 without masters; 2
//   more with fp32 gradients beside them.
// Deterministic. Sources: Kingma & Ba 2015; Loshchilov & Hutter 2019; Sutskever et al. 2013.
// Resources, the most over all variants and sm_80, sm_90, sm_100 (written by bench/compiled/kernel_resources.py):
//   kernel                                     registers  shared  spilled
//   adam_step_bfloat16                                64      64        0
//   adam_step_bfloat16+alone                          74      64        0
//   adam_step_float32                                 64      64        0
//   sgd_step_bfloat16                                 48      64        0
//   sgd_step_bfloat16+alone                           68      64        0
//   sgd_step_float32                                  48      64        0
//   squared_norm_bfloat16                             30      64        0
//   squared_norm_float32                              32      64        0
//   sum_finish_bfloat16                               30      64        0
//   sum_finish_float32                                30      64        0
#include "philox.cuh"
#include "storage.cuh"
#include "step_numbers.cuh"

constexpr int FLAT_THREADS = 256;
#ifdef CLLM_WITHOUT_MASTERS
constexpr bool MASTERS = false;
#else
constexpr bool MASTERS = true;
#endif
constexpr unsigned ROUNDING_SITE = 0xffffffffu;  // dropout's sites count from 0

// Sum over the block in fp64, in a fixed order; thread 0 gets it.
__device__ __forceinline__ double block_total(double x, double* exchange) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    if (threadIdx.x % 32 == 0) exchange[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0.0;
    if (threadIdx.x == 0)
        for (int warp = 0; warp < FLAT_THREADS / 32; warp++) total += exchange[warp];
    return total;
}

// Four neighbouring elements of which `count` exist, at once where the address allows.
struct Four {
    float v[4];
};

template <class T>
__device__ __forceinline__ bool whole(const T* p, int count) {
    return count == 4 && reinterpret_cast<u64>(p) % (4 * sizeof(T)) == 0;
}

template <class T>
__device__ __forceinline__ Four load_four(const T* p, int count) {
    if (whole(p, count)) {
        const float4 x = load_float4(p);
        return {{x.x, x.y, x.z, x.w}};
    }
    Four four = {};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i < count) four.v[i] = to_float(p[i]);
    return four;
}

template <class T>
__device__ __forceinline__ void store_four(T* p, const Four& four, int count) {
    if (whole(p, count)) {
        store_float4(p, make_float4(four.v[0], four.v[1], four.v[2], four.v[3]));
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i < count) store(p + i, four.v[i]);
}

// x as a number that bf16 holds: 16 random bits are added below its last place, and what is below is cut off.
__device__ __forceinline__ float round_stochastically(float x, unsigned word) {
    const float rounded = float_of_bits((bits_of_float(x) + (word & 0xffffu)) & 0xffff0000u);
    return x == x ? rounded : x;
}

// What a step reads and writes: the masters and their rounded copy, or the copy alone.
struct Weights {
    float* masters;
    real* copy;
    unsigned long long seed;
    const unsigned* step;
    index_t first;

    __device__ __forceinline__ Four load(index_t at, int count) const {
        if constexpr (MASTERS) return load_four(masters + at, count);
        return load_four(copy + at, count);
    }

    __device__ __forceinline__ void store(index_t at, Four p, int count) const {
        if constexpr (MASTERS) {
            store_four(masters + at, p, count);
        } else {
            PhiloxWords words(seed, step, ROUNDING_SITE);
#pragma unroll
            for (int i = 0; i < 4; i++) p.v[i] = round_stochastically(p.v[i], words.at(first + at + i));
        }
        if (copy != nullptr) store_four(copy + at, p, count);
    }
};

extern "C" __global__ void __launch_bounds__(FLAT_THREADS) ENTRY(adam_step)(
    float* parameters, gradient* gradients, float* first_moment, float* second_moment, real* copy, const float* clip,
    const int* skip, double* moved, long long size, long long decayed, float scale, float beta1, float beta2,
    float rest1, float rest2, float epsilon, float coupled_decay, const float* numbers, int zero_gradients,
    unsigned long long seed, const unsigned* step, long long first) {
    __shared__ double exchange[FLAT_THREADS / 32];
    if (skip != nullptr && *skip != 0) return;
    if (clip != nullptr) scale *= *clip;
    const float step_size = numbers[STEP_SIZE], inverse_correction2 = numbers[INVERSE_CORRECTION2];
    const float decoupled_decay = numbers[DECOUPLED_DECAY];
    const Weights weights{parameters, copy, seed, step, first};
    double squares = 0.0;
    const index_t stride = index_t(gridDim.x) * FLAT_THREADS * 4;
    for (index_t at = (index_t(blockIdx.x) * FLAT_THREADS + threadIdx.x) * 4; at < size; at += stride) {
        const int count = size - at < 4 ? int(size - at) : 4;
        Four p = weights.load(at, count), g = load_four(gradients + at, count);
        Four m = load_four(first_moment + at, count), v = load_four(second_moment + at, count);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bool decays = at + i < decayed;
            float x = g.v[i] * scale;
            if (decays) x += coupled_decay * p.v[i];
            m.v[i] = beta1 * m.v[i] + rest1 * x;
            v.v[i] = beta2 * v.v[i] + rest2 * (x * x);
            float update = m.v[i] / (sqrtf(v.v[i] * inverse_correction2) + epsilon) * step_size;
            if (decays) update += decoupled_decay * p.v[i];
            p.v[i] -= update;
            squares += double(update) * double(update);
        }
        weights.store(at, p, count);
        store_four(first_moment + at, m, count);
        store_four(second_moment + at, v, count);
        if (zero_gradients) store_four(gradients + at, Four{}, count);
    }
    if (moved == nullptr) return;
    squares = block_total(squares, exchange);
    if (threadIdx.x == 0) moved[blockIdx.x] = squares;
}

extern "C" __global__ void __launch_bounds__(FLAT_THREADS) ENTRY(sgd_step)(
    float* parameters, gradient* gradients, float* velocity, real* copy, const float* clip, const int* skip, double* moved,
    long long size, long long decayed, float scale, float momentum, float decay, const float* numbers,
    int zero_gradients, unsigned long long seed, const unsigned* step, long long first) {
    __shared__ double exchange[FLAT_THREADS / 32];
    if (skip != nullptr && *skip != 0) return;
    if (clip != nullptr) scale *= *clip;
    const float rate = numbers[STEP_SIZE];
    const Weights weights{parameters, copy, seed, step, first};
    double squares = 0.0;
    const index_t stride = index_t(gridDim.x) * FLAT_THREADS * 4;
    for (index_t at = (index_t(blockIdx.x) * FLAT_THREADS + threadIdx.x) * 4; at < size; at += stride) {
        const int count = size - at < 4 ? int(size - at) : 4;
        Four p = weights.load(at, count), g = load_four(gradients + at, count), u = {};
        if (velocity != nullptr) u = load_four(velocity + at, count);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x = g.v[i] * scale;
            if (at + i < decayed) x += decay * p.v[i];
            u.v[i] = momentum * u.v[i] + x;
            const float update = rate * u.v[i];
            p.v[i] -= update;
            squares += double(update) * double(update);
        }
        weights.store(at, p, count);
        if (velocity != nullptr) store_four(velocity + at, u, count);
        if (zero_gradients) store_four(gradients + at, Four{}, count);
    }
    if (moved == nullptr) return;
    squares = block_total(squares, exchange);
    if (threadIdx.x == 0) moved[blockIdx.x] = squares;
}

// partials[block] = Σ x² over the block's share, fp64: inf or nan where an element is not finite.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS) ENTRY(squared_norm)(
    const real* x, double* partials, long long size) {
    __shared__ double exchange[FLAT_THREADS / 32];
    double squares = 0.0;
    const index_t stride = index_t(gridDim.x) * FLAT_THREADS * 4;
    for (index_t at = (index_t(blockIdx.x) * FLAT_THREADS + threadIdx.x) * 4; at < size; at += stride) {
        const Four four = load_four(x + at, size - at < 4 ? int(size - at) : 4);
#pragma unroll
        for (int i = 0; i < 4; i++) squares += double(four.v[i]) * double(four.v[i]);
    }
    squares = block_total(squares, exchange);
    if (threadIdx.x == 0) partials[blockIdx.x] = squares;
}

// One block: total = Σ partials, in a fixed order.
extern "C" __global__ void __launch_bounds__(FLAT_THREADS) ENTRY(sum_finish)(
    const double* partials, double* total, int count) {
    __shared__ double exchange[FLAT_THREADS / 32];
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += FLAT_THREADS) sum += partials[i];
    sum = block_total(sum, exchange);
    if (threadIdx.x == 0) *total = sum;
}
