// What the attention kernels of both storage types share: where the operands lie, and which scores exist.
//
// -DHEAD_SIZE=D is the head size; rows are padded with zeros to PADDED on chip.
#pragma once
#include "score_terms.cuh"
#include "symmetry.cuh"

constexpr int D = HEAD_SIZE;

// One operand (batch, position, head, D) with contiguous last axis; strides in elements.
template <class T>
struct View {
    T* data;
    long long batch, row, head;

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
    // The score terms of one (batch item, query head), for scores that will be multiplied by `unit`.
    __device__ __forceinline__ ScoreTerms terms(const TermInputs& given, float unit, int b, int h) const {
        return ScoreTerms(given, keys - queries, keys, unit, b, h);
    }
    // Where query t stands among the keys.
    __device__ __forceinline__ int position(int t) const { return keys - queries + t; }
};
