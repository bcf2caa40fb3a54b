// The fp32 attention kernels: forward, and backward in two kernels. Included by attention.cu, which says what is
// computed; the layout is in attention_tiles_float32.cuh.
#pragma once
#include "attention_tiles_float32.cuh"

constexpr int FORWARD_ROWS = 64;  // queries of a tile of the forward
constexpr int FORWARD_SHARED = 4 * (FORWARD_ROWS * ROW + 2 * TILE_KEYS * ROW + FORWARD_ROWS * WEIGHTS_ROW);

// Output and log-sum-exp of the queries first … of one head: keys tile by tile, the softmax kept up to date (Milakov &
// Gimelshein 2018): when a row's maximum grows, what was summed before is scaled down.
__device__ __forceinline__ void forward_tile(const View<const float>& q, const View<const float>& k,
                                             const View<const float>& v, const View<float>& out, float* lse,
                                             const Sizes& n, const ScoreTerms& terms, const Symmetry& symmetry,
                                             int b, int h, int first, unsigned char* shared) {
    constexpr int I = FORWARD_ROWS / 16;
    float* const queries = reinterpret_cast<float*>(shared);
    float* const keys = queries + FORWARD_ROWS * ROW;
    float* const values = keys + TILE_KEYS * ROW;
    float* const weights = values + TILE_KEYS * ROW;
    const int x = threadIdx.x % 8, y = threadIdx.x / 8, kv = h / n.group();
    const int last = first + FORWARD_ROWS < n.queries ? first + FORWARD_ROWS : n.queries;
    float4 sums[I][CHUNKS] = {};
    float maxima[I], totals[I];
    ScoreTerms::Token rows[I];
#pragma unroll
    for (int i = 0; i < I; i++) {
        maxima[i] = -INFINITY_F;
        totals[i] = 0.0f;
        rows[i] = terms.query(first + y + 16 * i);
    }
    load_rows(queries, q.at(b, h), q.row, first, FORWARD_ROWS, n.queries, n.wide, &symmetry, n.position(first));
    for (int begin = 0; begin < n.visible(last - 1); begin += TILE_KEYS) {
        __syncthreads();
        load_rows(keys, k.at(b, kv), k.row, begin, TILE_KEYS, n.keys, n.wide, &symmetry, begin);
        load_rows(values, v.at(b, kv), v.row, begin, TILE_KEYS, n.keys, n.wide);
        __syncthreads();
        float scores[I][COLUMNS];
        row_products(scores, queries, keys);
        ScoreTerms::Token columns[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) columns[j] = terms.key(begin + x + 8 * j);
#pragma unroll
        for (int i = 0; i < I; i++) {
            const int t = first + y + 16 * i;
            const ScoreTerms::Token row[1] = {rows[i]};
            float score[1][COLUMNS], largest = maxima[i];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) score[0][j] = scores[i][j] * n.scale;
            terms.add_to(score, row, columns);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                scores[i][j] = n.exists(t, begin + x + 8 * j) ? score[0][j] : -INFINITY_F;
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

// The gradients of a tile of keys' points, each the sum over the threads that met the key, to partials (…, 3) from row
// `start` on. `exchange`: 16·TILE_KEYS·3 floats of shared memory.
__device__ __forceinline__ void store_key_points(float* partials, i64 start, int begin, int limit,
                                                 const float (&sums)[COLUMNS][3], float* exchange) {
    const int x = threadIdx.x % 8, y = threadIdx.x / 8;
    static_assert(16 * TILE_KEYS * 3 <= 2 * BACKWARD_ROWS * WEIGHTS_ROW, "room in the weights and their gradients");
    __syncthreads();
#pragma unroll
    for (int j = 0; j < COLUMNS; j++)
#pragma unroll
        for (int axis = 0; axis < 3; axis++) exchange[(y * TILE_KEYS + x + 8 * j) * 3 + axis] = sums[j][axis];
    __syncthreads();
    for (int i = threadIdx.x; i < TILE_KEYS * 3; i += THREADS) {
        if (begin + i / 3 >= limit) continue;
        float total = 0.0f;
        for (int part = 0; part < 16; part++) total += exchange[part * TILE_KEYS * 3 + i];
        partials[(start + begin) * 3 + i] = total;
    }
}

// dK and dV of the keys begin … of one key/value head, and the gradients of the keys' points: over the query heads that
// share it and their queries, in order.
__device__ __forceinline__ void backward_keys_tile(const View<const float>& dout, const View<const float>& q,
                                                   const View<const float>& k, const View<const float>& v,
                                                   const float* lse, const float* delta, const View<float>& dk,
                                                   const View<float>& dv, const Sizes& n, const TermInputs& given,
                                                   const Symmetry& symmetry, float* point_partials, int b, int kv,
                                                   int begin, unsigned char* shared) {
    constexpr int I = TILE_KEYS / 16;
    float* const queries = reinterpret_cast<float*>(shared);
    float* const douts = queries + BACKWARD_ROWS * ROW;
    float* const keys = douts + BACKWARD_ROWS * ROW;
    float* const values = keys + TILE_KEYS * ROW;
    float* const weights = values + TILE_KEYS * ROW;
    float* const dscores = weights + BACKWARD_ROWS * WEIGHTS_ROW;
    float4 key_sums[I][CHUNKS] = {}, value_sums[I][CHUNKS] = {};
    float point_sums[COLUMNS][3] = {};
    load_rows(keys, k.at(b, kv), k.row, begin, TILE_KEYS, n.keys, n.wide, &symmetry, begin);
    load_rows(values, v.at(b, kv), v.row, begin, TILE_KEYS, n.keys, n.wide);
    for (int h = kv * n.group(); h < (kv + 1) * n.group(); h++) {
        ScoreTerms terms = n.terms(given, term_unit(n), b, h);
        const i64 rows = (i64(b) * n.heads + h) * n.queries;
        for (int first = n.first_query(begin) / BACKWARD_ROWS * BACKWARD_ROWS; first < n.queries;
             first += BACKWARD_ROWS) {
            __syncthreads();
            load_rows(queries, q.at(b, h), q.row, first, BACKWARD_ROWS, n.queries, n.wide, &symmetry,
                      n.position(first));
            load_rows(douts, dout.at(b, h), dout.row, first, BACKWARD_ROWS, n.queries, n.wide);
            __syncthreads();
            backward_scores(queries, douts, keys, values, lse + rows, delta + rows, n, terms, false, first, begin,
                            weights, dscores, nullptr, POINT_GRADIENTS ? point_sums : nullptr);
            __syncthreads();
            weighted_rows<I, true>(value_sums, weights, douts, BACKWARD_ROWS);
            weighted_rows<I, true>(key_sums, dscores, queries, BACKWARD_ROWS);
        }
    }
    const float scales[I] = {n.scale, n.scale}, ones[I] = {1.0f, 1.0f};
    turn_back(key_sums, symmetry, begin);
    store_rows(dk.at(b, kv), dk.row, begin, n.keys, key_sums, scales, n.wide);
    store_rows(dv.at(b, kv), dv.row, begin, n.keys, value_sums, ones, n.wide);
    if (POINT_GRADIENTS)
        store_key_points(point_partials, (i64(b) * n.kv_heads + kv) * n.keys, begin, n.keys, point_sums, weights);
}

// The gradients of a tile of queries' points to partials (…, 3) from row `start` on.
__device__ __forceinline__ void store_query_points(float* partials, i64 start, int first, int limit,
                                                   const float (&sums)[BACKWARD_ROWS / 16][3]) {
    const int x = threadIdx.x % 8, y = threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < BACKWARD_ROWS / 16; i++) {
#pragma unroll
        for (int axis = 0; axis < 3; axis++) {
            const float total = over_row_sum(sums[i][axis]);
            const int t = first + y + 16 * i;
            if (x == axis && t < limit) partials[(start + t) * 3 + axis] = total;
        }
    }
}

// dQ of the queries first … of one head, and the block's part of the score terms' gradients.
__device__ __forceinline__ void backward_queries_tile(const View<const float>& dout, const View<const float>& q,
                                                      const View<const float>& k, const View<const float>& v,
                                                      const float* lse, const float* delta, const View<float>& dq,
                                                      const Sizes& n, ScoreTerms& terms, const Symmetry& symmetry,
                                                      float* term_partials, float* point_partials, int b, int h,
                                                      int first, unsigned char* shared) {
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
    float point_sums[I][3] = {};
    load_rows(queries, q.at(b, h), q.row, first, BACKWARD_ROWS, n.queries, n.wide, &symmetry, n.position(first));
    load_rows(douts, dout.at(b, h), dout.row, first, BACKWARD_ROWS, n.queries, n.wide);
    for (int begin = 0; begin < n.visible(last - 1); begin += TILE_KEYS) {
        __syncthreads();
        load_rows(keys, k.at(b, kv), k.row, begin, TILE_KEYS, n.keys, n.wide, &symmetry, begin);
        load_rows(values, v.at(b, kv), v.row, begin, TILE_KEYS, n.keys, n.wide);
        __syncthreads();
        backward_scores(queries, douts, keys, values, lse + rows, delta + rows, n, terms, true, first, begin, nullptr,
                        dscores, POINT_GRADIENTS ? point_sums : nullptr);
        __syncwarp();  // a row's gradients are written and read by one warp
        weighted_rows<I, false>(sums, dscores, keys, TILE_KEYS);
    }
    const float scales[I] = {n.scale, n.scale};
    turn_back(sums, symmetry, n.position(first));
    store_rows(dq.at(b, h), dq.row, first, n.queries, sums, scales, n.wide);
    if (POINT_GRADIENTS) store_query_points(point_partials, rows, first, n.queries, point_sums);
    terms.finish(term_partials, blockIdx.x, dscores);
}
