// What the attention kernels of both storage types share: where the operands lie, which scores exist, and the additive
// terms of the scores.
//
// -DHEAD_SIZE=D is the head size; rows are padded with zeros to PADDED on chip.
// -DSCORE_TERMS=0: none. 1: from four numbers per token, c = (x, y, z, id bits), and three per query head, (α, β, γ):
//     term(i, j) = −α·√((x_i − x_j)² + (y_i − y_j)²) − β·|z_i − z_j| + γ·[id_i = id_j]
//   added to scale·q·k, never stored; the backward recomputes it by the same function and sums dα, dβ, dγ per block.
#pragma once
#include "storage.cuh"

#ifndef SCORE_TERMS
#define SCORE_TERMS 0
#endif

constexpr int D = HEAD_SIZE;

// One operand (batch, position, head, D) with contiguous last axis; strides in elements.
template <class T>
struct View {
    T* data;
    i64 batch, row, head;

    __device__ __forceinline__ T* at(int b, int h) const { return data + b * batch + h * head; }
};

// Sizes of one call. Queries are the last `queries` of `keys` positions.
struct Sizes {
    int heads, kv_heads, queries, keys, causal, wide;
    float scale;

    __device__ __forceinline__ int group() const { return heads / kv_heads; }
    // Number of keys that query t sees.
    __device__ __forceinline__ int visible(int t) const { return causal ? keys - queries + t + 1 : keys; }
    // First query that sees key j.
    __device__ __forceinline__ int first_query(int j) const {
        return causal && j > keys - queries ? j - (keys - queries) : 0;
    }
    __device__ __forceinline__ bool exists(int t, int j) const { return t < queries && j < keys && j < visible(t); }
};

constexpr int TERM_COUNT = 3;

// The additive score terms of one (batch item, query head).
struct ScoreTerms {
#if SCORE_TERMS
    typedef float4 Token;
    const float4* coordinates;  // (keys) of this batch item
    int offset, keys;
    float alpha, beta, gamma;
    float dalpha = 0.0f, dbeta = 0.0f, dgamma = 0.0f;

    __device__ __forceinline__ ScoreTerms(const float* coordinates, const float* weights, const Sizes& sizes, int b,
                                          int h)
        : coordinates(reinterpret_cast<const float4*>(coordinates) + i64(b) * sizes.keys),
          offset(sizes.keys - sizes.queries),
          keys(sizes.keys),
          alpha(weights[h * TERM_COUNT]),
          beta(weights[h * TERM_COUNT + 1]),
          gamma(weights[h * TERM_COUNT + 2]) {}

    __device__ __forceinline__ Token key(int j) const { return coordinates[j < keys ? j : keys - 1]; }
    __device__ __forceinline__ Token query(int t) const { return key(t + offset); }
    __device__ __forceinline__ static float distance(const Token& a, const Token& b) {
        return sqrt_approx((a.x - b.x) * (a.x - b.x) + (a.y - b.y) * (a.y - b.y));
    }
    __device__ __forceinline__ static bool same(const Token& a, const Token& b) {
        return __float_as_uint(a.w) == __float_as_uint(b.w);
    }
    __device__ __forceinline__ float value(const Token& a, const Token& b) const {
        return -alpha * distance(a, b) - beta * fabsf(a.z - b.z) + (same(a, b) ? gamma : 0.0f);
    }
    // dx: the gradient by one score.
    __device__ __forceinline__ void add_gradient(const Token& a, const Token& b, float dx) {
        dalpha -= dx * distance(a, b);
        dbeta -= dx * fabsf(a.z - b.z);
        if (same(a, b)) dgamma += dx;
    }
    // Sums of the block, in a fixed order, to partials[index]; `exchange`: 3 floats per warp of shared memory.
    __device__ __forceinline__ void finish(float* partials, i64 index, float* exchange) const {
        const float sums[TERM_COUNT] = {warp_sum(dalpha), warp_sum(dbeta), warp_sum(dgamma)};
        __syncthreads();
        if (threadIdx.x % 32 == 0)
            for (int i = 0; i < TERM_COUNT; i++) exchange[threadIdx.x / 32 * TERM_COUNT + i] = sums[i];
        __syncthreads();
        if (threadIdx.x >= TERM_COUNT) return;
        float total = 0.0f;
        for (int warp = 0; warp < blockDim.x / 32; warp++) total += exchange[warp * TERM_COUNT + threadIdx.x];
        partials[index * TERM_COUNT + threadIdx.x] = total;
    }
#else
    struct Token {};
    __device__ __forceinline__ ScoreTerms(const float*, const float*, const Sizes&, int, int) {}
    __device__ __forceinline__ Token key(int) const { return {}; }
    __device__ __forceinline__ Token query(int) const { return {}; }
    __device__ __forceinline__ float value(const Token&, const Token&) const { return 0.0f; }
    __device__ __forceinline__ void add_gradient(const Token&, const Token&, float) {}
    __device__ __forceinline__ void finish(float*, i64, float*) const {}
#endif
};
