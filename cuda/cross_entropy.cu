// Softmax cross-entropy over the vocabulary and, in the logits' own buffer, its gradient.
//
//   loss = log Σ_v exp(x_v) − x_target,   dx = (softmax(x) − onehot(target))·gradient_scale
//   a row whose target is ignore_index has loss 0 and gradient 0
//
// logits (N, V) real, overwritten where write_gradient; targets (N) int32; losses (N) fp32.
// Work: a block per row; a thread keeps up to PACKS packs of 16 bytes of it in registers (all of 50,304 columns of bf16
//   with 1024 threads), what is beyond is read again. The maximum is subtracted before exp.
// Traffic per logit: 1 read, 1 write (the row is read once where it fits); exp twice.
// Deterministic. A target outside [0, V) that is not ignore_index gives NaN, never an access outside the row.
// Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; here max and sum from registers.
#include "storage.cuh"

constexpr int PACKS = 7;
constexpr int WARPS_MOST = 32;

struct Maximum {
    static constexpr float neutral = -3.402823466e38f;
    __device__ __forceinline__ static float of(float a, float b) { return fmaxf(a, b); }
};
struct Sum {
    static constexpr float neutral = 0.0f;
    __device__ __forceinline__ static float of(float a, float b) { return a + b; }
};

// One value per thread combined over the block; `exchange` holds a float per warp. Every thread gets the result.
template <class Combine>
__device__ __forceinline__ float block_reduce(float x, float* exchange) {
    for (int offset = 16; offset > 0; offset /= 2) x = Combine::of(x, __shfl_xor_sync(FULL_WARP, x, offset));
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) exchange[threadIdx.x / 32] = x;
    __syncthreads();
    x = lane < warps ? exchange[lane] : Combine::neutral;
    for (int offset = 16; offset > 0; offset /= 2) x = Combine::of(x, __shfl_xor_sync(FULL_WARP, x, offset));
    __syncthreads();  // `exchange` may be used again
    return x;
}

// W neighbouring logits as they lie in memory: half the registers of floats in bf16.
template <int W>
struct Stored {
    u32 words[4];

    __device__ __forceinline__ void read(const real* p) {
        if constexpr (W == 1) {
            words[0] = bits_of_float(to_float(*p));
        } else {
            const uint4 memory = *reinterpret_cast<const uint4*>(p);
            words[0] = memory.x, words[1] = memory.y, words[2] = memory.z, words[3] = memory.w;
        }
    }

    __device__ __forceinline__ Pack<W> values() const {
        Pack<W> pack;
        if constexpr (W == 1) {
            pack.v[0] = float_of_bits(words[0]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if constexpr (W == 4) {
                    pack.v[i] = float_of_bits(words[i]);
                } else {
                    const float2 pair = unpack_bf16(words[i]);
                    pack.v[2 * i] = pair.x;
                    pack.v[2 * i + 1] = pair.y;
                }
            }
        }
        return pack;
    }
};

// A thread's packs of one row; those not kept are read again at every visit.
template <int W>
struct RowPart {
    Stored<W> kept[PACKS];
    const real* row;
    int first, step, columns;

    __device__ __forceinline__ RowPart(const real* row, int columns)
        : row(row), first(threadIdx.x * W), step(blockDim.x * W), columns(columns) {
#pragma unroll
        for (int p = 0; p < PACKS; p++)
            if (first + p * step < columns) kept[p].read(row + first + p * step);
    }

    template <class Use>
    __device__ __forceinline__ void visit(Use use) const {
#pragma unroll
        for (int p = 0; p < PACKS; p++)
            if (first + p * step < columns) use(kept[p].values(), first + p * step);
        for (int column = first + PACKS * step; column < columns; column += step)
            use(load_pack<W>(row + column), column);
    }
};

template <int W>
__device__ __forceinline__ void cross_entropy_row(real* row, int target, float* loss, int columns, int ignore_index,
                                                  int write_gradient, float gradient_scale, float* exchange) {
    const RowPart<W> part(row, columns);
    float largest = Maximum::neutral;
    part.visit([&](const Pack<W>& x, int) {
#pragma unroll
        for (int i = 0; i < W; i++) largest = fmaxf(largest, x.v[i]);
    });
    largest = block_reduce<Maximum>(largest, exchange);
    float total = 0.0f;
    part.visit([&](const Pack<W>& x, int) {
#pragma unroll
        for (int i = 0; i < W; i++) total += expf(x.v[i] - largest);
    });
    // its barriers also stand between everyone's reads of the row and the writes below
    const bool inside = target >= 0 && target < columns, counted = target != ignore_index;
    const float chosen = inside ? to_float(row[target]) : __uint_as_float(0x7fffffffu);
    total = block_reduce<Sum>(total, exchange);
    if (threadIdx.x == 0) *loss = counted ? logf(total) - (chosen - largest) : 0.0f;
    if (!write_gradient) return;
    const float weight = counted ? gradient_scale : 0.0f, share = weight / total;
    part.visit([&](Pack<W> x, int column) {
#pragma unroll
        for (int i = 0; i < W; i++)
            x.v[i] = counted ? expf(x.v[i] - largest) * share - (column + i == target ? weight : 0.0f) : 0.0f;
        store_pack<W>(row + column, x);
    });
}

extern "C" __global__ void __launch_bounds__(WARPS_MOST * 32) ENTRY(cross_entropy)(
    real* logits, const int* targets, float* losses, int columns, int ignore_index, int write_gradient,
    float gradient_scale) {
    __shared__ float exchange[WARPS_MOST];
    const index_t row = blockIdx.x;
    real* const x = logits + row * columns;
    if (wide_rows(logits, columns))
        cross_entropy_row<WIDE<real>>(x, targets[row], losses + row, columns, ignore_index, write_gradient,
                                      gradient_scale, exchange);
    else
        cross_entropy_row<1>(x, targets[row], losses + row, columns, ignore_index, write_gradient, gradient_scale,
                             exchange);
}
