// Adam and AdamW, SGD with momentum, and the sum of squares, on flat buffers.
//
//   g = scale·clip·gradient (+ decay·p, Adam)      clip: a device scalar, or 1 where its pointer is null
//   m = β1·m + (1 − β1)·g,   v = β2·v + (1 − β2)·g²
//   update = step_size·m / (√(v·inverse_correction2) + ε) (+ rate·decay·p, AdamW);   p −= update
//   SGD: g = scale·clip·gradient + decay·p,  u = momentum·u + g,  p −= rate·u
//
// parameters, moments (n) fp32 (the master weights in bf16 training); gradients (n) gradient; copy (n) real or null
// gets the rounded parameters. With -DCLLM_WITHOUT_MASTERS the parameters are not used: the copy itself is what is
// stepped, in fp32, and rounded stochastically by Philox words at (element / 4, step, 2^32 - 1), elements counting from
// `first_element`, key `seed`, as in cllm_gpu/ops/reference/rounding.py. The first `decayed` elements have weight
// decay. skip: null, or an int that when not 0 makes the kernel write nothing. zero_gradients: the gradients are zeroed
// in the same pass.
// numbers (3) fp32, step (1): what changes from step to step is read from the device (step_numbers.cuh).
// moved (blocks) fp64 or null: Σ update² per block, added up by sum_finish in a fixed order.
// Work: a thread takes 4 neighbouring elements, blocks stride over the buffer. Traffic per parameter: 28 bytes fp32
//   (read p, g, m, v; write p, m, v), 28 with bf16 gradients and copy (30 when zeroing), 22 without masters; 2
//   more with fp32 gradients beside them.
// Deterministic. Sources: Kingma & Ba 2015; Loshchilov & Hutter 2019; Sutskever et al. 2013.
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

// Where the words of a stochastic rounding are drawn from; not read where there are masters.
struct Rounding {
    unsigned long long seed;
    const unsigned* step;
    long long first_element;
};

// What a step reads and writes: the masters and their rounded copy, or the copy alone.
struct Weights {
    float* masters;
    real* copy;
    Rounding rounding;

    __device__ __forceinline__ Four load(index_t at, int count) const {
        if constexpr (MASTERS) return load_four(masters + at, count);
        return load_four(copy + at, count);
    }

    __device__ __forceinline__ void store(index_t at, Four p, int count) const {
        if constexpr (MASTERS) {
            store_four(masters + at, p, count);
        } else {
            PhiloxWords words(rounding.seed, rounding.step, ROUNDING_SITE);
#pragma unroll
            for (int i = 0; i < 4; i++)
                p.v[i] = round_stochastically(p.v[i], words.at(rounding.first_element + at + i));
        }
        if (copy != nullptr) store_four(copy + at, p, count);
    }
};

struct AdamParams {
    float* parameters;
    gradient* gradients;
    float *first_moment, *second_moment;
    real* copy;
    const float *numbers, *clip;
    const int* skip;
    double* moved;
    Rounding rounding;
    long long size, decayed;
    float scale, beta1, beta2, rest1, rest2, epsilon, coupled_decay;
    int zero_gradients;
};

extern "C" __global__ void __launch_bounds__(FLAT_THREADS) ENTRY(adam_step)(
    const __grid_constant__ AdamParams params) {
    __shared__ double exchange[FLAT_THREADS / 32];
    if (params.skip != nullptr && *params.skip != 0) return;
    const float scale = params.clip != nullptr ? params.scale * *params.clip : params.scale;
    const float step_size = params.numbers[STEP_SIZE], inverse_correction2 = params.numbers[INVERSE_CORRECTION2];
    const float decoupled_decay = params.numbers[DECOUPLED_DECAY];
    const Weights weights{params.parameters, params.copy, params.rounding};
    double squares = 0.0;
    const index_t stride = index_t(gridDim.x) * FLAT_THREADS * 4;
    for (index_t at = (index_t(blockIdx.x) * FLAT_THREADS + threadIdx.x) * 4; at < params.size; at += stride) {
        const int count = params.size - at < 4 ? int(params.size - at) : 4;
        Four p = weights.load(at, count), g = load_four(params.gradients + at, count);
        Four m = load_four(params.first_moment + at, count), v = load_four(params.second_moment + at, count);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bool decays = at + i < params.decayed;
            float x = g.v[i] * scale;
            if (decays) x += params.coupled_decay * p.v[i];
            m.v[i] = params.beta1 * m.v[i] + params.rest1 * x;
            v.v[i] = params.beta2 * v.v[i] + params.rest2 * (x * x);
            float update = m.v[i] / (sqrtf(v.v[i] * inverse_correction2) + params.epsilon) * step_size;
            if (decays) update += decoupled_decay * p.v[i];
            p.v[i] -= update;
            squares += double(update) * double(update);
        }
        weights.store(at, p, count);
        store_four(params.first_moment + at, m, count);
        store_four(params.second_moment + at, v, count);
        if (params.zero_gradients) store_four(params.gradients + at, Four{}, count);
    }
    if (params.moved == nullptr) return;
    squares = block_total(squares, exchange);
    if (threadIdx.x == 0) params.moved[blockIdx.x] = squares;
}

struct SgdParams {
    float* parameters;
    gradient* gradients;
    float* velocity;
    real* copy;
    const float *numbers, *clip;
    const int* skip;
    double* moved;
    Rounding rounding;
    long long size, decayed;
    float scale, momentum, decay;
    int zero_gradients;
};

extern "C" __global__ void __launch_bounds__(FLAT_THREADS) ENTRY(sgd_step)(
    const __grid_constant__ SgdParams params) {
    __shared__ double exchange[FLAT_THREADS / 32];
    if (params.skip != nullptr && *params.skip != 0) return;
    const float scale = params.clip != nullptr ? params.scale * *params.clip : params.scale;
    const float rate = params.numbers[STEP_SIZE];
    const Weights weights{params.parameters, params.copy, params.rounding};
    double squares = 0.0;
    const index_t stride = index_t(gridDim.x) * FLAT_THREADS * 4;
    for (index_t at = (index_t(blockIdx.x) * FLAT_THREADS + threadIdx.x) * 4; at < params.size; at += stride) {
        const int count = params.size - at < 4 ? int(params.size - at) : 4;
        Four p = weights.load(at, count), g = load_four(params.gradients + at, count), u = {};
        if (params.velocity != nullptr) u = load_four(params.velocity + at, count);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x = g.v[i] * scale;
            if (at + i < params.decayed) x += params.decay * p.v[i];
            u.v[i] = params.momentum * u.v[i] + x;
            const float update = rate * u.v[i];
            p.v[i] -= update;
            squares += double(update) * double(update);
        }
        weights.store(at, p, count);
        if (params.velocity != nullptr) store_four(params.velocity + at, u, count);
        if (params.zero_gradients) store_four(params.gradients + at, Four{}, count);
    }
    if (params.moved == nullptr) return;
    squares = block_total(squares, exchange);
    if (threadIdx.x == 0) params.moved[blockIdx.x] = squares;
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
