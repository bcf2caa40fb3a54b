// The bf16 attention kernels: forward, and backward in two kernels. Included by attention.cu, which says
// what is computed.
//
// 4 warps. In every kernel a warp owns 16·M_TILES rows (queries forward and for dQ, keys for dK and dV) and meets all
// columns of the tile of the other side, so that a score's row lives in one warp and the accumulators of S become,
// packed to bf16, the left operand of the next product without passing through shared memory:
//   forward   S = Q Kᵀ, P;          O  += P V
//   queries   S = Q Kᵀ, dP = dO Vᵀ; dQ += dS K
//   keys      Sᵀ = K Qᵀ, dPᵀ = V dOᵀ; dV += Pᵀ dO, dK += dSᵀ Q
// The tiles of the moving side are double-buffered: the next one is on its way while this one is used.
// Operands and sizes are passed by value: read from the kernel's parameters once, not again at each use in a loop.
#pragma once
#include "attention.cuh"

constexpr int THREADS = 128;

#include "attention_tiles_bfloat16.cuh"
#include "symmetry_bfloat16.cuh"

// Rows of a warp in 16s, and columns of a tile in 8s: the most that the registers hold (cllm_gpu.ops.cuda.attention
// knows the same numbers).
constexpr int POINTS_N = POINTS ? 2 : 0;  // the registers that the points take
constexpr int FORWARD_M = 2, FORWARD_N = (D <= 64 ? 8 : 6) - POINTS_N;
constexpr int QUERIES_M = 2, QUERIES_N = (D <= 64 ? 6 : 4) - POINTS_N;
constexpr int KEYS_M = D <= 64 ? 2 : 1, KEYS_N = D <= 64 ? 4 : (D <= 96 ? 8 : 6) - POINTS_N;
constexpr int FORWARD_ROWS = WARPS * 16 * FORWARD_M, FORWARD_KEYS = 8 * FORWARD_N;
constexpr int BACKWARD_ROWS = WARPS * 16 * QUERIES_M, BACKWARD_KEYS = 8 * QUERIES_N;
constexpr int TILE_KEYS = WARPS * 16 * KEYS_M, KEYS_QUERIES = 8 * KEYS_N;

constexpr int FORWARD_SHARED = tile_bytes(FORWARD_ROWS) + 4 * tile_bytes(FORWARD_KEYS);
constexpr int QUERIES_SHARED = 2 * tile_bytes(BACKWARD_ROWS) + 4 * tile_bytes(BACKWARD_KEYS);
constexpr int KEYS_STAGE = 2 * tile_bytes(KEYS_QUERIES) + 2 * 4 * KEYS_QUERIES;  // Q, dO, and lse and δ of its queries
constexpr int KEYS_SHARED = 2 * tile_bytes(TILE_KEYS) + 2 * KEYS_STAGE;

// The running softmax of a warp's rows.
template <int M>
struct Softmax {
    float maxima[M][2], totals[M][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) maxima[m][half] = -INFINITY_F, totals[m][half] = 0.0f;
    }

    // scores become weights 2^(factor·(score − maximum)); what was summed before is scaled down to the new maxima.
    // A thread adds up its own columns only; over_row_sum at the end joins them. factor > 0.
    template <int N>
    __device__ __forceinline__ void update(Accumulator<M, N>& scores, Accumulator<M, D_TILES>& sums, float factor) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float largest = maxima[m][half];
#pragma unroll
                for (int n = 0; n < N; n++)
                    largest = fmaxf(largest, fmaxf(scores.v[m][n][2 * half], scores.v[m][n][2 * half + 1]));
                largest = over_row_max(largest);
                // rows past the last query: no key
                const float base = largest == -INFINITY_F ? 0.0f : largest * factor;
                const float shrink = exp2_approx(maxima[m][half] * factor - base);
                float total = totals[m][half] * shrink;
#pragma unroll
                for (int n = 0; n < N; n++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float& x = scores.v[m][n][2 * half + i];
                        x = exp2_approx(x * factor - base);
                        total += x;
                    }
                }
                maxima[m][half] = largest;
                totals[m][half] = total;
                if (!__any_sync(FULL_WARP, shrink != 1.0f)) continue;  // after the first tiles a maximum seldom grows
#pragma unroll
                for (int n = 0; n < D_TILES; n++) {
                    sums.v[m][n][2 * half] *= shrink;
                    sums.v[m][n][2 * half + 1] *= shrink;
                }
            }
        }
    }
};

// Output and log-sum-exp of the queries first … of one head.
__device__ __forceinline__ void forward_tile(View<const bf16> q, View<const bf16> k, View<const bf16> v,
                                             View<bf16> out, float* lse, Sizes n, const ScoreTerms& terms,
                                             const Symmetry& symmetry, int b, int h, int first,
                                             unsigned char* shared) {
    const Tile<FORWARD_ROWS> queries = {shared};
    unsigned char* const stages = shared + tile_bytes(FORWARD_ROWS);
    const int kv = h / n.group(), row = threadIdx.x / 32 * 16 * FORWARD_M;
    const int last = first + FORWARD_ROWS < n.queries ? first + FORWARD_ROWS : n.queries;
    const int end = n.visible(last - 1);
    const auto start = [&](int begin) {
        unsigned char* const stage = stages + begin / FORWARD_KEYS % 2 * 2 * tile_bytes(FORWARD_KEYS);
        Tile<FORWARD_KEYS>{stage}.load(k.at(b, kv), k.row, begin, n.keys, n.wide);
        Tile<FORWARD_KEYS>{stage + tile_bytes(FORWARD_KEYS)}.load(v.at(b, kv), v.row, begin, n.keys, n.wide);
    };
    Accumulator<FORWARD_M, D_TILES> sums;
    Softmax<FORWARD_M> softmax;
    sums.clear();
    softmax.clear();
    queries.load(q.at(b, h), q.row, first, n.queries, n.wide);
    start(0);
    copy_async_commit();
    turn_arrived(queries, symmetry, n.position(first));
    for (int begin = 0; begin < end; begin += FORWARD_KEYS) {
        if (begin + FORWARD_KEYS < end) start(begin + FORWARD_KEYS);
        copy_async_commit();
        copy_async_wait<1>();
        unsigned char* const stage = stages + begin / FORWARD_KEYS % 2 * 2 * tile_bytes(FORWARD_KEYS);
        turn_rows(Tile<FORWARD_KEYS>{stage}, symmetry, begin);
        __syncthreads();
        Accumulator<FORWARD_M, FORWARD_N> scores;
        row_products(scores, queries, row, Tile<FORWARD_KEYS>{stage});
        finish_scores<false>(scores, n, terms, first + row, begin);
        softmax.update(scores, sums, exponent_factor(n));
        weighted_rows(sums, scores, Tile<FORWARD_KEYS>{stage + tile_bytes(FORWARD_KEYS)});
        __syncthreads();  // the stage may be overwritten
    }
    const int g = threadIdx.x % 32 / 4;
    float factors[FORWARD_M][2];
#pragma unroll
    for (int m = 0; m < FORWARD_M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = first + row + 16 * m + 8 * half + g;
            const float total = over_row_sum(softmax.totals[m][half]);
            factors[m][half] = 1.0f / total;
            if (threadIdx.x % 4 == 0 && t < n.queries)
                lse[(i64(b) * n.heads + h) * n.queries + t] =
                    softmax.maxima[m][half] * (exponent_factor(n) * LN2) + logf(total);
        }
    }
    store_rows(out.at(b, h), out.row, first + row, n.queries, sums, factors, n.wide);
}

// dQ of the queries first … of one head, and the block's part of the score terms' gradients.
__device__ __forceinline__ void backward_queries_tile(View<const bf16> dout, View<const bf16> q, View<const bf16> k,
                                                      View<const bf16> v, const float* lse, const float* delta,
                                                      View<bf16> dq, Sizes n, ScoreTerms& terms,
                                                      const Symmetry& symmetry, float* term_partials,
                                                      float* point_partials, int b, int h, int first,
                                                      unsigned char* shared) {
    constexpr int M = QUERIES_M, N = QUERIES_N;
    const Tile<BACKWARD_ROWS> queries = {shared}, douts = {shared + tile_bytes(BACKWARD_ROWS)};
    unsigned char* const stages = shared + 2 * tile_bytes(BACKWARD_ROWS);
    const int kv = h / n.group(), row = threadIdx.x / 32 * 16 * M, g = threadIdx.x % 32 / 4;
    const float factor = exponent_factor(n);
    const int last = first + BACKWARD_ROWS < n.queries ? first + BACKWARD_ROWS : n.queries;
    const int end = n.visible(last - 1);
    const auto start = [&](int begin) {
        unsigned char* const stage = stages + begin / BACKWARD_KEYS % 2 * 2 * tile_bytes(BACKWARD_KEYS);
        Tile<BACKWARD_KEYS>{stage}.load(k.at(b, kv), k.row, begin, n.keys, n.wide);
        Tile<BACKWARD_KEYS>{stage + tile_bytes(BACKWARD_KEYS)}.load(v.at(b, kv), v.row, begin, n.keys, n.wide);
    };
    float row_lse[M][2], row_delta[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = first + row + 16 * m + 8 * half + g;
            const i64 at = (i64(b) * n.heads + h) * n.queries + t;
            row_lse[m][half] = t < n.queries ? lse[at] * LOG2E : 0.0f;
            row_delta[m][half] = t < n.queries ? delta[at] : 0.0f;
        }
    }
    Accumulator<M, D_TILES> sums;
    PointSums<M> point_sums;
    sums.clear();
    queries.load(q.at(b, h), q.row, first, n.queries, n.wide);
    douts.load(dout.at(b, h), dout.row, first, n.queries, n.wide);
    start(0);
    copy_async_commit();
    turn_arrived(queries, symmetry, n.position(first));
    for (int begin = 0; begin < end; begin += BACKWARD_KEYS) {
        if (begin + BACKWARD_KEYS < end) start(begin + BACKWARD_KEYS);
        copy_async_commit();
        copy_async_wait<1>();
        unsigned char* const stage = stages + begin / BACKWARD_KEYS % 2 * 2 * tile_bytes(BACKWARD_KEYS);
        turn_rows(Tile<BACKWARD_KEYS>{stage}, symmetry, begin);
        __syncthreads();
        Accumulator<M, N> scores, dweights;
        row_products(scores, queries, row, Tile<BACKWARD_KEYS>{stage});
        finish_scores<false>(scores, n, terms, first + row, begin);
        row_products(dweights, douts, row, Tile<BACKWARD_KEYS>{stage + tile_bytes(BACKWARD_KEYS)});
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int tile = 0; tile < N; tile++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float& ds = dweights.v[m][tile][2 * half + i];
                        const float p = exp2_approx(scores.v[m][tile][2 * half + i] * factor - row_lse[m][half]);
                        ds = p * (ds - row_delta[m][half]);
                    }
                }
            }
        }
        add_term_gradients<false>(terms, dweights, first + row, begin);
        if (POINT_GRADIENTS) point_sums.add<false>(terms, dweights, first + row, begin);
        weighted_rows(sums, dweights, Tile<BACKWARD_KEYS>{stage});
        __syncthreads();  // the stage may be overwritten
    }
    float factors[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factors[m][0] = factors[m][1] = n.scale;
    turn_back(sums, symmetry, n.position(first + row));
    store_rows(dq.at(b, h), dq.row, first + row, n.queries, sums, factors, n.wide);
    if (POINT_GRADIENTS)
        point_sums.store(point_partials, (i64(b) * n.heads + h) * n.queries, first + row, n.queries, term_unit(n));
    terms.finish(term_partials, blockIdx.x, reinterpret_cast<float*>(stages));
}

// dK and dV of the keys begin … of one key/value head, and the gradients of the keys' points: over the query heads that
// share it and their queries, in order.
__device__ __forceinline__ void backward_keys_tile(View<const bf16> dout, View<const bf16> q, View<const bf16> k,
                                                   View<const bf16> v, const float* lse, const float* delta,
                                                   View<bf16> dk, View<bf16> dv, Sizes n, TermInputs given,
                                                   const Symmetry& symmetry, float* point_partials, int b, int kv,
                                                   int begin, unsigned char* shared) {
    constexpr int M = KEYS_M, N = KEYS_N;
    const Tile<TILE_KEYS> keys = {shared}, values = {shared + tile_bytes(TILE_KEYS)};
    unsigned char* const stages = shared + 2 * tile_bytes(TILE_KEYS);
    const int row = threadIdx.x / 32 * 16 * M;
    const int skipped = n.first_query(begin) / KEYS_QUERIES;  // tiles of queries that see none of the keys
    const int tiles = (n.queries + KEYS_QUERIES - 1) / KEYS_QUERIES - skipped, steps = tiles * n.group();
    const auto stage_of = [&](int step) { return stages + step % 2 * KEYS_STAGE; };
    const auto numbers_of = [&](int step) {
        return reinterpret_cast<float*>(stage_of(step) + 2 * tile_bytes(KEYS_QUERIES));
    };
    const auto start = [&](int step) {
        const int h = kv * n.group() + step / tiles, first = (skipped + step % tiles) * KEYS_QUERIES;
        Tile<KEYS_QUERIES>{stage_of(step)}.load(q.at(b, h), q.row, first, n.queries, n.wide);
        Tile<KEYS_QUERIES>{stage_of(step) + tile_bytes(KEYS_QUERIES)}.load(dout.at(b, h), dout.row, first, n.queries,
                                                                          n.wide);
        const i64 rows = (i64(b) * n.heads + h) * n.queries;
        load_numbers<KEYS_QUERIES>(numbers_of(step), lse + rows, first, n.queries);
        load_numbers<KEYS_QUERIES>(numbers_of(step) + KEYS_QUERIES, delta + rows, first, n.queries);
    };
    Accumulator<M, D_TILES> key_sums, value_sums;
    PointSums<M> point_sums;
    ScoreTerms terms = n.terms(given, term_unit(n), b, kv * n.group());
    key_sums.clear();
    value_sums.clear();
    keys.load(k.at(b, kv), k.row, begin, n.keys, n.wide);
    values.load(v.at(b, kv), v.row, begin, n.keys, n.wide);
    if (steps > 0) start(0);
    copy_async_commit();
    turn_arrived(keys, symmetry, begin);
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) start(step + 1);
        copy_async_commit();
        copy_async_wait<1>();
        const int h = kv * n.group() + step / tiles, first = (skipped + step % tiles) * KEYS_QUERIES;
        const Tile<KEYS_QUERIES> queries = {stage_of(step)}, douts = {stage_of(step) + tile_bytes(KEYS_QUERIES)};
        turn_rows(queries, symmetry, n.position(first));
        __syncthreads();
        if (step % tiles == 0) terms = n.terms(given, term_unit(n), b, h);
        Accumulator<M, N> scores, dweights;
        row_products(scores, keys, row, queries);
        finish_scores<true>(scores, n, terms, first, begin + row);
        row_products(dweights, values, row, douts);
        backward_scores(scores, dweights, numbers_of(step), numbers_of(step) + KEYS_QUERIES, exponent_factor(n));
        if (POINT_GRADIENTS) point_sums.add<true>(terms, dweights, first, begin + row);
        weighted_rows(value_sums, scores, douts);
        weighted_rows(key_sums, dweights, queries);
        __syncthreads();  // the stage may be overwritten
    }
    float scales[M][2], ones[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) scales[m][0] = scales[m][1] = n.scale, ones[m][0] = ones[m][1] = 1.0f;
    turn_back(key_sums, symmetry, begin + row);
    store_rows(dk.at(b, kv), dk.row, begin + row, n.keys, key_sums, scales, n.wide);
    store_rows(dv.at(b, kv), dv.row, begin + row, n.keys, value_sums, ones, n.wide);
    if (POINT_GRADIENTS)
        point_sums.store(point_partials, (i64(b) * n.kv_heads + kv) * n.keys, begin + row, n.keys, term_unit(n));
}
