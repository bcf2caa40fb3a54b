// The fused attention backward in fp32. Included by attention_fused.cu, which says what is computed; the layout is in
// attention_tiles_float32.cuh. The running sums of dQ stand in dq, unscaled until the last block's turn.
#pragma once
#include "attention_fused.cuh"
#include "attention_tiles_float32.cuh"

// The running sums of the rows first … below `limit`, past the L1 cache: other blocks wrote them.
template <int I>
__device__ __forceinline__ void load_sums(float4 (&sums)[I][CHUNKS], const float* rows_of, i64 stride, int first,
                                          int limit, int wide) {
    const int x = threadIdx.x % 8, y = threadIdx.x / 8;
#pragma unroll
    for (int i = 0; i < I; i++) {
        const int row = first + y + 16 * i;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const int column = (x + 8 * c) * 4;
            if (row >= limit || column >= PADDED) continue;
            const float* const p = rows_of + row * stride + column;
            if (wide) {
                sums[i][c] = __ldcg(reinterpret_cast<const float4*>(p));
            } else {
                sums[i][c].x = __ldcg(p);
                if (column + 1 < D) sums[i][c].y = __ldcg(p + 1);
                if (column + 2 < D) sums[i][c].z = __ldcg(p + 2);
                if (column + 3 < D) sums[i][c].w = __ldcg(p + 3);
            }
        }
    }
}

// dK and dV of the keys of one tile of one key/value head, and its part of dQ of every query that sees them.
__device__ __forceinline__ void backward_fused_tile(
    const View<const float>& dout, const View<const float>& q, const View<const float>& k, const View<const float>& v,
    const float* lse, const float* delta, const View<float>& dq, const View<float>& dk, const View<float>& dv, float*,
    u32* turns, const Sizes& n, const TermInputs& given, const Symmetry& symmetry, float* term_partials, int b, int kv,
    int tile, unsigned char* shared) {
    constexpr int I = TILE_KEYS / 16;
    static_assert(TILE_KEYS == BACKWARD_ROWS, "I rows a thread on both sides");
    float* const queries = reinterpret_cast<float*>(shared);
    float* const douts = queries + BACKWARD_ROWS * ROW;
    float* const keys = douts + BACKWARD_ROWS * ROW;
    float* const values = keys + TILE_KEYS * ROW;
    float* const weights = values + TILE_KEYS * ROW;
    float* const dscores = weights + BACKWARD_ROWS * WEIGHTS_ROW;
    const int begin = tile * TILE_KEYS, tiles = (n.queries + BACKWARD_ROWS - 1) / BACKWARD_ROWS;
    const float scales[I] = {n.scale, n.scale}, ones[I] = {1.0f, 1.0f};
    float4 key_sums[I][CHUNKS] = {}, value_sums[I][CHUNKS] = {};
    load_rows(keys, k.at(b, kv), k.row, begin, TILE_KEYS, n.keys, n.wide, &symmetry, begin);
    load_rows(values, v.at(b, kv), v.row, begin, TILE_KEYS, n.keys, n.wide);
    for (int h = kv * n.group(); h < (kv + 1) * n.group(); h++) {
        ScoreTerms terms = n.terms(given, term_unit(n), b, h);
        const i64 head = i64(b) * n.heads + h, rows = head * n.queries;
        for (int at = n.first_query(begin) / BACKWARD_ROWS; at < tiles; at++) {
            const int first = at * BACKWARD_ROWS;
            const Turn turn(turns + head * tiles + at, n, first + BACKWARD_ROWS - 1, tile, TILE_KEYS);
            load_rows(queries, q.at(b, h), q.row, first, BACKWARD_ROWS, n.queries, n.wide, &symmetry,
                      n.position(first));
            load_rows(douts, dout.at(b, h), dout.row, first, BACKWARD_ROWS, n.queries, n.wide);
            __syncthreads();
            backward_scores(queries, douts, keys, values, lse + rows, delta + rows, n, terms, true, first, begin,
                            weights, dscores);
            turn.wait();  // its barrier is the one between writing and reading the weights, too
            float4 query_sums[I][CHUNKS] = {};
            if (turn.place > 0) load_sums(query_sums, dq.at(b, h), dq.row, first, n.queries, n.wide);
            weighted_rows<I, true>(value_sums, weights, douts, BACKWARD_ROWS);
            weighted_rows<I, true>(key_sums, dscores, queries, BACKWARD_ROWS);
            weighted_rows<I, false>(query_sums, dscores, keys, TILE_KEYS);
            if (turn.final) turn_back(query_sums, symmetry, n.position(first));
            store_rows(dq.at(b, h), dq.row, first, n.queries, query_sums, turn.final ? scales : ones, n.wide);
            turn.pass();  // its barrier lets the tiles be overwritten, too
        }
        terms.finish(term_partials, head * ((n.keys + TILE_KEYS - 1) / TILE_KEYS) + tile, dscores);
    }
    turn_back(key_sums, symmetry, begin);
    store_rows(dk.at(b, kv), dk.row, begin, n.keys, key_sums, scales, n.wide);
    store_rows(dv.at(b, kv), dv.row, begin, n.keys, value_sums, ones, n.wide);
}
