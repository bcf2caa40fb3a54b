// Pieces of the fp32 attention kernels on plain FMA: rows in shared memory, products of tiles, and the backward's
// scores.
//
// 128 threads as 16 × 8: thread (y, x) of a score tile holds rows y + 16·i and columns x + 8·j; of an output tile rows
// y + 16·i and chunks x + 8·j of four neighbouring columns. The 8 threads of a row are neighbouring lanes.
#pragma once
#include "attention.cuh"

constexpr int THREADS = 128;
constexpr int TILE_KEYS = 32;
constexpr int BACKWARD_ROWS = 32;  // queries of a tile of the backward
constexpr int PADDED = (D + 3) / 4 * 4;
constexpr int ROW = PADDED + 4;                // floats from row to row in shared memory: spreads rows over the banks
constexpr int WEIGHTS_ROW = TILE_KEYS + 8;     // the same for a tile of scores
constexpr int CHUNKS = (PADDED / 4 + 7) / 8;  // chunks of four columns per thread
constexpr int COLUMNS = TILE_KEYS / 8;        // score columns per thread

// What scores are multiplied by after the terms were added: nothing.
__device__ __forceinline__ float term_unit(const Sizes&) { return 1.0f; }

constexpr int BACKWARD_SHARED =
    4 * (2 * BACKWARD_ROWS * ROW + 2 * TILE_KEYS * ROW + 2 * BACKWARD_ROWS * WEIGHTS_ROW);

// Rows first … first + rows − 1 of an operand to shared memory, zeros from `limit` on and in the padding. Queries and
// keys are turned by the symmetry, if it is given: row `first` is then that of position `position`.
__device__ __forceinline__ void load_rows(float* shared, const float* rows_of, i64 stride, int first, int rows,
                                          int limit, int wide, const Symmetry* symmetry = nullptr, int position = 0) {
    for (int i = threadIdx.x; i < rows * (PADDED / 4); i += THREADS) {
        const int row = i / (PADDED / 4), column = i % (PADDED / 4) * 4;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + row < limit) {
            const float* const p = rows_of + (first + row) * stride + column;
            if (wide) {
                x = load4(p);
            } else {
                x.x = p[0];
                if (column + 1 < D) x.y = p[1];
                if (column + 2 < D) x.z = p[2];
                if (column + 3 < D) x.w = p[3];
            }
        }
        if (SYMMETRY && symmetry != nullptr && column < 2 * PAIRS) {
            const Symmetry::Element element = symmetry->element(position + row);
            turn(x.x, x.y, element, column / 2);
            if (column + 2 < 2 * PAIRS) turn(x.z, x.w, element, column / 2 + 1);
        }
        store4(shared + row * ROW + column, x);
    }
}

// scores[i][j] = a[row y + 16·i] · b[row x + 8·j]
template <int I>
__device__ __forceinline__ void row_products(float (&scores)[I][COLUMNS], const float* a, const float* b) {
    const int x = threadIdx.x % 8, y = threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < I; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) scores[i][j] = 0.0f;
#pragma unroll 4
    for (int d = 0; d < PADDED; d += 4) {
        float4 u[I], v[COLUMNS];
#pragma unroll
        for (int i = 0; i < I; i++) u[i] = load4(a + (y + 16 * i) * ROW + d);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) v[j] = load4(b + (x + 8 * j) * ROW + d);
#pragma unroll
        for (int i = 0; i < I; i++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
                scores[i][j] += u[i].x * v[j].x + u[i].y * v[j].y + u[i].z * v[j].z + u[i].w * v[j].w;
    }
}

// sums[i] += Σ_k weights(row y + 16·i, k)·rows[k], over `count` rows; the weights lie transposed where TRANSPOSED.
template <int I, bool TRANSPOSED>
__device__ __forceinline__ void weighted_rows(float4 (&sums)[I][CHUNKS], const float* weights, const float* rows,
                                              int count) {
    const int x = threadIdx.x % 8, y = threadIdx.x / 8;
    for (int k = 0; k < count; k++) {
        float w[I];
#pragma unroll
        for (int i = 0; i < I; i++)
            w[i] = TRANSPOSED ? weights[k * WEIGHTS_ROW + y + 16 * i] : weights[(y + 16 * i) * WEIGHTS_ROW + k];
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            if ((x + 8 * c) * 4 >= PADDED) continue;
            const float4 v = load4(rows + k * ROW + (x + 8 * c) * 4);
#pragma unroll
            for (int i = 0; i < I; i++) {
                sums[i][c].x += w[i] * v.x;
                sums[i][c].y += w[i] * v.y;
                sums[i][c].z += w[i] * v.z;
                sums[i][c].w += w[i] * v.w;
            }
        }
    }
}

// Gradients of rows that were turned, from position `position` on, to those of the rows as they are in memory.
template <int I>
__device__ __forceinline__ void turn_back(float4 (&sums)[I][CHUNKS], const Symmetry& symmetry, int position) {
    if (!SYMMETRY) return;
    const int x = threadIdx.x % 8, y = threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < I; i++) {
        const Symmetry::Element element = symmetry.element(position + y + 16 * i);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const int m = (x + 8 * c) * 2;
            if (m < PAIRS) turn_back(sums[i][c].x, sums[i][c].y, element, m);
            if (m + 1 < PAIRS) turn_back(sums[i][c].z, sums[i][c].w, element, m + 1);
        }
    }
}

// rows_of[first + row] = factors[i]·sums for the rows below `limit`.
template <int I>
__device__ __forceinline__ void store_rows(float* rows_of, i64 stride, int first, int limit,
                                           const float4 (&sums)[I][CHUNKS], const float (&factors)[I], int wide) {
    const int x = threadIdx.x % 8, y = threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < I; i++) {
        const int row = first + y + 16 * i;
        if (row >= limit) continue;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const int column = (x + 8 * c) * 4;
            if (column >= PADDED) continue;
            const float4 v = make_float4(sums[i][c].x * factors[i], sums[i][c].y * factors[i],
                                         sums[i][c].z * factors[i], sums[i][c].w * factors[i]);
            float* const p = rows_of + row * stride + column;
            if (wide) {
                store4(p, v);
            } else {
                p[0] = v.x;
                if (column + 1 < D) p[1] = v.y;
                if (column + 2 < D) p[2] = v.z;
                if (column + 3 < D) p[3] = v.w;
            }
        }
    }
}

__device__ __forceinline__ float over_row_sum(float x) {
    for (int offset = 4; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}
__device__ __forceinline__ float over_row_max(float x) {
    for (int offset = 4; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

// Weights P = exp(x − lse) and score gradients dS = P∘(dP − δ) of one tile, into shared memory where asked; what dS
// gives the score terms: their scalars (own_terms), and the points of the thread's queries or keys, where there are
// sums for it.
__device__ __forceinline__ void backward_scores(const float* queries, const float* douts, const float* keys,
                                                const float* values, const float* lse, const float* delta,
                                                const Sizes& n, ScoreTerms& terms, bool own_terms, int first,
                                                int begin, float* weights, float* dscores,
                                                float (*query_points)[3] = nullptr,
                                                float (*key_points)[3] = nullptr) {
    constexpr int I = BACKWARD_ROWS / 16;
    const int x = threadIdx.x % 8, y = threadIdx.x / 8;
    float scores[I][COLUMNS], dweights[I][COLUMNS];
    row_products(scores, queries, keys);
    row_products(dweights, douts, values);
    ScoreTerms::Token columns[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) columns[j] = terms.key(begin + x + 8 * j);
#pragma unroll
    for (int i = 0; i < I; i++) {
        const int t = first + y + 16 * i;
        const float row_lse = t < n.queries ? lse[t] : 0.0f, row_delta = t < n.queries ? delta[t] : 0.0f;
        const ScoreTerms::Token row[1] = {terms.query(t)};
        float score[1][COLUMNS], ds[1][COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) score[0][j] = scores[i][j] * n.scale;
        terms.add_to(score, row, columns);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const int at = (y + 16 * i) * WEIGHTS_ROW + x + 8 * j;
            const float p = n.exists(t, begin + x + 8 * j) ? expf(score[0][j] - row_lse) : 0.0f;
            ds[0][j] = p * (dweights[i][j] - row_delta);
            if (weights != nullptr) weights[at] = p;
            dscores[at] = ds[0][j];
            if (query_points != nullptr) terms.add_slope(query_points[i], ds[0][j], row[0], columns[j]);
            if (key_points != nullptr) terms.add_slope(key_points[j], -ds[0][j], row[0], columns[j]);
        }
        if (own_terms) terms.add_gradients(ds, row, columns);
    }
}
