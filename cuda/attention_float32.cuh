// Attention tiles in fp32 on plain FMA. Included by attention.cu, which says what is computed.
//
// 128 threads as 16 × 8: thread (y, x) of a score tile holds rows y + 16·i and columns x + 8·j; of an output tile rows
// y + 16·i and chunks x + 8·j of four neighbouring columns. The 8 threads of a row are neighbouring lanes.
#pragma once
#include "attention.cuh"

constexpr int THREADS = 128;
constexpr int TILE_KEYS = 32;
constexpr int FORWARD_ROWS = 64, BACKWARD_ROWS = 32;  // queries of a tile
constexpr int PADDED = (D + 3) / 4 * 4;
constexpr int ROW = PADDED + 4;                // floats from row to row in shared memory: spreads rows over the banks
constexpr int WEIGHTS_ROW = TILE_KEYS + 8;     // the same for a tile of scores
constexpr int CHUNKS = (PADDED / 4 + 7) / 8;  // chunks of four columns per thread
constexpr int COLUMNS = TILE_KEYS / 8;        // score columns per thread

constexpr int FORWARD_SHARED = 4 * (FORWARD_ROWS * ROW + 2 * TILE_KEYS * ROW + FORWARD_ROWS * WEIGHTS_ROW);
constexpr int BACKWARD_SHARED =
    4 * (2 * BACKWARD_ROWS * ROW + 2 * TILE_KEYS * ROW + 2 * BACKWARD_ROWS * WEIGHTS_ROW);

// Rows first … first + rows − 1 of an operand to shared memory, zeros from `limit` on and in the padding.
__device__ __forceinline__ void load_rows(float* shared, const float* rows_of, i64 stride, int first, int rows,
                                          int limit, int wide) {
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

// Output and log-sum-exp of the queries first … of one head: keys tile by tile, the softmax kept up to date (Milakov &
// Gimelshein 2018): when a row's maximum grows, what was summed before is scaled down.
__device__ __forceinline__ void forward_tile(const View<const float>& q, const View<const float>& k,
                                             const View<const float>& v, const View<float>& out, float* lse,
                                             const Sizes& n, const ScoreTerms& terms, int b, int h, int first,
                                             unsigned char* shared) {
    constexpr int I = FORWARD_ROWS / 16;
    float* const queries = reinterpret_cast<float*>(shared);
    float* const keys = queries + FORWARD_ROWS * ROW;
    float* const values = keys + TILE_KEYS * ROW;
    float* const weights = values + TILE_KEYS * ROW;
    const int x = threadIdx.x % 8, y = threadIdx.x / 8, kv = h / n.group();
    const int last = first + FORWARD_ROWS < n.queries ? first + FORWARD_ROWS : n.queries;
    float4 sums[I][CHUNKS] = {};
    float maxima[I], totals[I];
    ScoreTerms::Token tokens[I];
#pragma unroll
    for (int i = 0; i < I; i++) {
        maxima[i] = -INFINITY_F;
        totals[i] = 0.0f;
        tokens[i] = terms.query(first + y + 16 * i);
    }
    load_rows(queries, q.at(b, h), q.row, first, FORWARD_ROWS, n.queries, n.wide);
    for (int begin = 0; begin < n.visible(last - 1); begin += TILE_KEYS) {
        __syncthreads();
        load_rows(keys, k.at(b, kv), k.row, begin, TILE_KEYS, n.keys, n.wide);
        load_rows(values, v.at(b, kv), v.row, begin, TILE_KEYS, n.keys, n.wide);
        __syncthreads();
        float scores[I][COLUMNS];
        row_products(scores, queries, keys);
#pragma unroll
        for (int i = 0; i < I; i++) {
            const int t = first + y + 16 * i;
            float largest = maxima[i];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                const int key = begin + x + 8 * j;
                const float score = scores[i][j] * n.scale + terms.value(tokens[i], terms.key(key));
                scores[i][j] = n.exists(t, key) ? score : -INFINITY_F;
                largest = fmaxf(largest, scores[i][j]);
            }
            largest = over_row_max(largest);
            const float base = largest == -INFINITY_F ? 0.0f : largest;  // rows beyond the last query see no key
            const float shrink = expf(maxima[i] - base);
            float total = 0.0f;
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                const float p = expf(scores[i][j] - base);
                weights[(y + 16 * i) * WEIGHTS_ROW + x + 8 * j] = p;
                total += p;
            }
            totals[i] = totals[i] * shrink + over_row_sum(total);
            maxima[i] = largest;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                sums[i][c].x *= shrink;
                sums[i][c].y *= shrink;
                sums[i][c].z *= shrink;
                sums[i][c].w *= shrink;
            }
        }
        __syncwarp();  // a row's weights are written and read by one warp
        weighted_rows<I, false>(sums, weights, values, TILE_KEYS);
    }
    float factors[I];
#pragma unroll
    for (int i = 0; i < I; i++) {
        const int t = first + y + 16 * i;
        factors[i] = 1.0f / totals[i];
        if (x == 0 && t < n.queries) lse[(i64(b) * n.heads + h) * n.queries + t] = maxima[i] + logf(totals[i]);
    }
    store_rows(out.at(b, h), out.row, first, n.queries, sums, factors, n.wide);
}

// Weights P = exp(x − lse) and score gradients dS = P∘(dP − δ) of one tile, into shared memory where asked.
__device__ __forceinline__ void backward_scores(const float* queries, const float* douts, const float* keys,
                                                const float* values, const float* lse, const float* delta,
                                                const Sizes& n, ScoreTerms& terms, bool own_terms, int first,
                                                int begin, float* weights, float* dscores) {
    constexpr int I = BACKWARD_ROWS / 16;
    const int x = threadIdx.x % 8, y = threadIdx.x / 8;
    float scores[I][COLUMNS], dweights[I][COLUMNS];
    row_products(scores, queries, keys);
    row_products(dweights, douts, values);
#pragma unroll
    for (int i = 0; i < I; i++) {
        const int t = first + y + 16 * i;
        const float row_lse = t < n.queries ? lse[t] : 0.0f, row_delta = t < n.queries ? delta[t] : 0.0f;
        const ScoreTerms::Token token = terms.query(t);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const int key = begin + x + 8 * j, at = (y + 16 * i) * WEIGHTS_ROW + x + 8 * j;
            const ScoreTerms::Token other = terms.key(key);
            const float score = scores[i][j] * n.scale + terms.value(token, other);
            const float p = n.exists(t, key) ? expf(score - row_lse) : 0.0f;
            const float ds = p * (dweights[i][j] - row_delta);
            if (weights != nullptr) weights[at] = p;
            dscores[at] = ds;
            if (own_terms) terms.add_gradient(token, other, ds);
        }
    }
}

// dK and dV of the keys begin … of one key/value head: over the query heads that share it and their queries, in order.
__device__ __forceinline__ void backward_keys_tile(const View<const float>& dout, const View<const float>& q,
                                                   const View<const float>& k, const View<const float>& v,
                                                   const float* lse, const float* delta, const View<float>& dk,
                                                   const View<float>& dv, const Sizes& n, const float* coordinates,
                                                   const float* term_weights, int b, int kv, int begin,
                                                   unsigned char* shared) {
    constexpr int I = TILE_KEYS / 16;
    float* const queries = reinterpret_cast<float*>(shared);
    float* const douts = queries + BACKWARD_ROWS * ROW;
    float* const keys = douts + BACKWARD_ROWS * ROW;
    float* const values = keys + TILE_KEYS * ROW;
    float* const weights = values + TILE_KEYS * ROW;
    float* const dscores = weights + BACKWARD_ROWS * WEIGHTS_ROW;
    float4 key_sums[I][CHUNKS] = {}, value_sums[I][CHUNKS] = {};
    load_rows(keys, k.at(b, kv), k.row, begin, TILE_KEYS, n.keys, n.wide);
    load_rows(values, v.at(b, kv), v.row, begin, TILE_KEYS, n.keys, n.wide);
    for (int h = kv * n.group(); h < (kv + 1) * n.group(); h++) {
        ScoreTerms terms(coordinates, term_weights, n, b, h);
        const i64 rows = (i64(b) * n.heads + h) * n.queries;
        for (int first = n.first_query(begin) / BACKWARD_ROWS * BACKWARD_ROWS; first < n.queries;
             first += BACKWARD_ROWS) {
            __syncthreads();
            load_rows(queries, q.at(b, h), q.row, first, BACKWARD_ROWS, n.queries, n.wide);
            load_rows(douts, dout.at(b, h), dout.row, first, BACKWARD_ROWS, n.queries, n.wide);
            __syncthreads();
            backward_scores(queries, douts, keys, values, lse + rows, delta + rows, n, terms, false, first, begin,
                            weights, dscores);
            __syncthreads();
            weighted_rows<I, true>(value_sums, weights, douts, BACKWARD_ROWS);
            weighted_rows<I, true>(key_sums, dscores, queries, BACKWARD_ROWS);
        }
    }
    const float scales[I] = {n.scale, n.scale}, ones[I] = {1.0f, 1.0f};
    store_rows(dk.at(b, kv), dk.row, begin, n.keys, key_sums, scales, n.wide);
    store_rows(dv.at(b, kv), dv.row, begin, n.keys, value_sums, ones, n.wide);
}

// dQ of the queries first … of one head, and the block's part of the score terms' gradients.
__device__ __forceinline__ void backward_queries_tile(const View<const float>& dout, const View<const float>& q,
                                                      const View<const float>& k, const View<const float>& v,
                                                      const float* lse, const float* delta, const View<float>& dq,
                                                      const Sizes& n, ScoreTerms& terms, float* term_partials, int b,
                                                      int h, int first, unsigned char* shared) {
    constexpr int I = BACKWARD_ROWS / 16;
    float* const queries = reinterpret_cast<float*>(shared);
    float* const douts = queries + BACKWARD_ROWS * ROW;
    float* const keys = douts + BACKWARD_ROWS * ROW;
    float* const values = keys + TILE_KEYS * ROW;
    float* const dscores = values + TILE_KEYS * ROW;
    const int kv = h / n.group();
    const int last = first + BACKWARD_ROWS < n.queries ? first + BACKWARD_ROWS : n.queries;
    const i64 rows = (i64(b) * n.heads + h) * n.queries;
    float4 sums[I][CHUNKS] = {};
    load_rows(queries, q.at(b, h), q.row, first, BACKWARD_ROWS, n.queries, n.wide);
    load_rows(douts, dout.at(b, h), dout.row, first, BACKWARD_ROWS, n.queries, n.wide);
    for (int begin = 0; begin < n.visible(last - 1); begin += TILE_KEYS) {
        __syncthreads();
        load_rows(keys, k.at(b, kv), k.row, begin, TILE_KEYS, n.keys, n.wide);
        load_rows(values, v.at(b, kv), v.row, begin, TILE_KEYS, n.keys, n.wide);
        __syncthreads();
        backward_scores(queries, douts, keys, values, lse + rows, delta + rows, n, terms, true, first, begin, nullptr,
                        dscores);
        __syncwarp();  // a row's gradients are written and read by one warp
        weighted_rows<I, false>(sums, dscores, keys, TILE_KEYS);
    }
    const float scales[I] = {n.scale, n.scale};
    store_rows(dq.at(b, h), dq.row, first, n.queries, sums, scales, n.wide);
    terms.finish(term_partials, dscores);
}
