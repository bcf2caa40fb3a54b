// Attention tiles in bf16 on tensor cores (mma.sync m16n8k16, fp32 accumulators). Included by attention.cu, which says
// what is computed.
//
// 4 warps. In every kernel a warp owns 16·M_TILES rows (queries forward and for dQ, keys for dK and dV) and meets all
// columns of the tile of the other side, so that a score's row lives in one warp and the accumulators of S become,
// packed to bf16, the left operand of the next product without passing through shared memory:
//   forward   S = Q Kᵀ, P;          O  += P V
//   queries   S = Q Kᵀ, dP = dO Vᵀ; dQ += dS K
//   keys      Sᵀ = K Qᵀ, dPᵀ = V dOᵀ; dV += Pᵀ dO, dK += dSᵀ Q
// Shared memory: a tile is pages of 64 columns, 128 bytes a row; the 16-byte chunk c of row r stands at c XOR (r mod 8),
// so that ldmatrix, plain and transposed, and cp.async all touch every bank once. The tiles of the moving side are
// double-buffered: the next one is on its way while this one is used.
#pragma once
#include "attention.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int PADDED = (D + 15) / 16 * 16;
constexpr int PAGES = (PADDED + 63) / 64;
constexpr int D_STEPS = PADDED / 16;  // k-steps of a product over the head size
constexpr int D_TILES = PADDED / 8;   // n-tiles of a product that gives head columns

// Rows of a warp in 16s, and columns of a tile in 8s: the most that the registers hold (cllm_gpu.fused.attention knows
// the same numbers).
constexpr int TERMS_N = SCORE_TERMS ? 2 : 0;  // the registers that the terms take
constexpr int FORWARD_M = 2, FORWARD_N = (D <= 64 ? 8 : 6) - TERMS_N;
constexpr int QUERIES_M = 2, QUERIES_N = (D <= 64 ? 6 : 4) - TERMS_N;
constexpr int KEYS_M = D <= 64 ? 2 : 1, KEYS_N = D <= 64 ? 4 : D <= 96 ? 8 : 6;
constexpr int FORWARD_ROWS = WARPS * 16 * FORWARD_M, FORWARD_KEYS = 8 * FORWARD_N;
constexpr int BACKWARD_ROWS = WARPS * 16 * QUERIES_M, BACKWARD_KEYS = 8 * QUERIES_N;
constexpr int TILE_KEYS = WARPS * 16 * KEYS_M, KEYS_QUERIES = 8 * KEYS_N;

__device__ constexpr int tile_bytes(int rows) { return PAGES * rows * 128; }
constexpr int FORWARD_SHARED = tile_bytes(FORWARD_ROWS) + 4 * tile_bytes(FORWARD_KEYS);
constexpr int QUERIES_SHARED = 2 * tile_bytes(BACKWARD_ROWS) + 4 * tile_bytes(BACKWARD_KEYS);
constexpr int KEYS_STAGE = 2 * tile_bytes(KEYS_QUERIES) + 2 * 4 * KEYS_QUERIES;  // Q, dO, and lse and δ of its queries
constexpr int KEYS_SHARED = 2 * tile_bytes(TILE_KEYS) + 2 * KEYS_STAGE;

// `ROWS` rows of an operand in shared memory.
template <int ROWS>
struct Tile {
    unsigned char* base;

    // Address of the 16-byte chunk `chunk` (8 columns) of a row.
    __device__ __forceinline__ unsigned char* at(int row, int chunk) const {
        return base + (chunk / 8 * ROWS + row) * 128 + ((chunk % 8) ^ (row % 8)) * 16;
    }

    // Starts the copy of rows first … of an operand: zeros from `limit` on and in the padding. Without 16-byte accesses
    // (wide = 0) the copy is complete at once.
    __device__ __forceinline__ void load(const bf16* rows_of, i64 stride, int first, int limit, int wide) const {
        constexpr int CHUNKS = PADDED / 8;
        for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            const bool valid = first + row < limit;
            const bf16* const p = rows_of + (valid ? (first + row) * stride : 0);
            if (wide) {
                const bool inside = valid && chunk * 8 < D;
                copy_async_16(at(row, chunk), p + (inside ? chunk * 8 : 0), inside);
            } else {
                u32 words[4];
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    const int column = chunk * 8 + 2 * w;
                    const u32 low = valid && column < D ? p[column].bits : 0;
                    const u32 high = valid && column + 1 < D ? p[column + 1].bits : 0;
                    words[w] = low | high << 16;
                }
                *reinterpret_cast<uint4*>(at(row, chunk)) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }
};

// Accumulators of 16·M rows and 8·N columns: lane 4·g + t holds of each 16×8 tile the elements (g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1).
template <int M, int N>
struct Accumulator {
    float v[M][N][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) v[m][n][i] = 0.0f;
    }
};

// acc = (rows a_row … of a) · (all rows of b)ᵀ, over the head size.
template <int M, int N, int A_ROWS>
__device__ __forceinline__ void row_products(Accumulator<M, N>& acc, const Tile<A_ROWS>& a, int a_row,
                                             const Tile<8 * N>& b) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    acc.clear();
#pragma unroll
    for (int k = 0; k < D_STEPS; k++) {
        u32 left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
            load_matrix_x4(left[m], a.at(a_row + 16 * m + matrix % 2 * 8 + r, 2 * k + matrix / 2));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 right[4];
            load_matrix_x4(right, b.at(8 * n + matrix / 2 * 8 + r, 2 * k + matrix % 2));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(acc.v[m][n], left[m], right[0], right[1]);
                mma_bf16(acc.v[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// acc += weights · b, over the rows of b: the weights are accumulators, packed to bf16 here.
template <int M, int N>
__device__ __forceinline__ void weighted_rows(Accumulator<M, D_TILES>& acc, const Accumulator<M, N>& weights,
                                              const Tile<8 * N>& b) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        u32 left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            const float(&low)[4] = weights.v[m][2 * k], (&high)[4] = weights.v[m][2 * k + 1];
            left[m][0] = pack_bf16(low[0], low[1]);
            left[m][1] = pack_bf16(low[2], low[3]);
            left[m][2] = pack_bf16(high[0], high[1]);
            left[m][3] = pack_bf16(high[2], high[3]);
        }
#pragma unroll
        for (int n = 0; n < D_TILES; n += 2) {
            u32 right[4];
            load_matrix_x4_trans(right, b.at(16 * k + matrix % 2 * 8 + r, n + matrix / 2));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(acc.v[m][n], left[m], right[0], right[1]);
                mma_bf16(acc.v[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// Of two neighbouring 16×8 tiles a lane holds columns 2t, 2t + 1 of each (packed: `low`, `high`). The four lanes of a row
// trade words, so that lane t gets four neighbouring columns: those from 4·(t mod 2) on of tile t / 2.
__device__ __forceinline__ uint2 neighbouring_columns(u32 low, u32 high) {
    const int t = threadIdx.x % 4;
    const u32 own = t < 2 ? low : high, other = __shfl_xor_sync(FULL_WARP, t < 2 ? high : low, 2);
    const bool outer = t == 0 || t == 3;  // keeps its own word, hands on the one it was given
    const u32 kept = outer ? own : other, got = __shfl_xor_sync(FULL_WARP, outer ? other : own, 1);
    return t % 2 == 0 ? make_uint2(kept, got) : make_uint2(got, kept);
}

// rows_of[row + …] = acc·factor for the rows below `limit`; factors[m][half] belongs to rows 16·m + 8·half + g. With
// 16-byte accesses (wide) the lanes of a row write whole 32-byte sectors.
template <int M>
__device__ __forceinline__ void store_rows(bf16* rows_of, i64 stride, int row, int limit,
                                           const Accumulator<M, D_TILES>& acc, const float (&factors)[M][2], int wide) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = row + 16 * m + 8 * half + g;
            bf16* const p = rows_of + (at < limit ? at * stride : 0);
#pragma unroll
            for (int n = 0; n < D_TILES; n += 2) {
                u32 words[2];
#pragma unroll
                for (int i = 0; i < 2; i++)
                    words[i] = pack_bf16(acc.v[m][n + i][2 * half] * factors[m][half],
                                         acc.v[m][n + i][2 * half + 1] * factors[m][half]);
                if (wide) {
                    const uint2 four = neighbouring_columns(words[0], words[1]);
                    const int column = 8 * (n + t / 2) + t % 2 * 4;
                    if (at < limit && column < D) *reinterpret_cast<uint2*>(p + column) = four;
                } else {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int column = 8 * (n + i) + 2 * t;
                        if (at < limit && column < D) p[column] = bf16{u16(words[i])};
                        if (at < limit && column + 1 < D) p[column + 1] = bf16{u16(words[i] >> 16)};
                    }
                }
            }
        }
    }
}

__device__ __forceinline__ float over_row_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}
__device__ __forceinline__ float over_row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

// What a score is multiplied by to be an exponent of 2. With terms the scores are exponents already.
__device__ __forceinline__ float exponent_factor(const Sizes& n) { return SCORE_TERMS ? 1.0f : n.scale * LOG2E; }

// The query and the key of element i of half `half` of the 16×8 tile (m, tile) of scores whose rows begin at query t and
// columns at key j; TRANSPOSED: rows at key j, columns at query t.
template <bool TRANSPOSED>
struct Place {
    int query, key;

    __device__ __forceinline__ Place(int t, int j, int m, int half, int tile, int i) {
        const int row = 16 * m + 8 * half + threadIdx.x % 32 / 4, column = 8 * tile + 2 * (threadIdx.x % 4) + i;
        query = t + (TRANSPOSED ? column : row);
        key = j + (TRANSPOSED ? row : column);
    }
};

// Raw products become exponents where there are score terms, and −∞ where a query does not see the key.
template <bool TRANSPOSED, int M, int N>
__device__ __forceinline__ void finish_scores(Accumulator<M, N>& scores, const Sizes& n, const ScoreTerms& terms, int t,
                                              int j) {
    constexpr int QUERIES = TRANSPOSED ? 8 * N : 16 * M, KEYS = TRANSPOSED ? 16 * M : 8 * N;
    const bool whole = t + QUERIES <= n.queries && j + KEYS <= n.keys && j + KEYS <= n.visible(t);
    if (!SCORE_TERMS && whole) return;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int tile = 0; tile < N; tile++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const Place<TRANSPOSED> at(t, j, m, half, tile, i);
                    float& x = scores.v[m][tile][2 * half + i];
                    if (SCORE_TERMS) x = (x * n.scale + terms.value(terms.query(at.query), terms.key(at.key))) * LOG2E;
                    if (!n.exists(at.query, at.key)) x = -INFINITY_F;
                }
            }
        }
    }
}

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
                const float base = largest == -INFINITY_F ? 0.0f : largest * factor;  // rows past the last query: no key
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
__device__ __forceinline__ void forward_tile(const View<const bf16>& q, const View<const bf16>& k,
                                             const View<const bf16>& v, const View<bf16>& out, float* lse,
                                             const Sizes& n, const ScoreTerms& terms, int b, int h, int first,
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
    for (int begin = 0; begin < end; begin += FORWARD_KEYS) {
        if (begin + FORWARD_KEYS < end) start(begin + FORWARD_KEYS);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        unsigned char* const stage = stages + begin / FORWARD_KEYS % 2 * 2 * tile_bytes(FORWARD_KEYS);
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
                lse[(i64(b) * n.heads + h) * n.queries + t] = softmax.maxima[m][half] * (exponent_factor(n) * LN2) + logf(total);
        }
    }
    store_rows(out.at(b, h), out.row, first + row, n.queries, sums, factors, n.wide);
}

// dQ of the queries first … of one head, and the block's part of the score terms' gradients.
__device__ __forceinline__ void backward_queries_tile(const View<const bf16>& dout, const View<const bf16>& q,
                                                      const View<const bf16>& k, const View<const bf16>& v,
                                                      const float* lse, const float* delta, const View<bf16>& dq,
                                                      const Sizes& n, ScoreTerms& terms, float* term_partials, int b,
                                                      int h, int first, unsigned char* shared) {
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
    sums.clear();
    queries.load(q.at(b, h), q.row, first, n.queries, n.wide);
    douts.load(dout.at(b, h), dout.row, first, n.queries, n.wide);
    start(0);
    copy_async_commit();
    for (int begin = 0; begin < end; begin += BACKWARD_KEYS) {
        if (begin + BACKWARD_KEYS < end) start(begin + BACKWARD_KEYS);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        unsigned char* const stage = stages + begin / BACKWARD_KEYS % 2 * 2 * tile_bytes(BACKWARD_KEYS);
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
                        if (SCORE_TERMS) {
                            const Place<false> at(first + row, begin, m, half, tile, i);
                            terms.add_gradient(terms.query(at.query), terms.key(at.key), ds);
                        }
                    }
                }
            }
        }
        weighted_rows(sums, dweights, Tile<BACKWARD_KEYS>{stage});
        __syncthreads();  // the stage may be overwritten
    }
    float factors[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factors[m][0] = factors[m][1] = n.scale;
    store_rows(dq.at(b, h), dq.row, first + row, n.queries, sums, factors, n.wide);
    terms.finish(term_partials, reinterpret_cast<float*>(stages));
}

// Transposed scores of one tile: S becomes P, dP becomes dS. lse and delta of the tile's queries, in shared memory.
template <int M, int N>
__device__ __forceinline__ void backward_scores(Accumulator<M, N>& scores, Accumulator<M, N>& dweights,
                                                const float* lse, const float* delta, float factor) {
#pragma unroll
    for (int tile = 0; tile < N; tile++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int column = 8 * tile + 2 * (threadIdx.x % 4) + i;
            const float column_lse = lse[column] * LOG2E, column_delta = delta[column];
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float& p = scores.v[m][tile][2 * half + i];
                    float& ds = dweights.v[m][tile][2 * half + i];
                    p = exp2_approx(p * factor - column_lse);
                    ds = p * (ds - column_delta);
                }
            }
        }
    }
}

// Starts the copy of `COUNT` numbers of queries first … to shared memory, zeros from `limit` on: there Q and dO are zero
// too, so that whatever weight comes out adds nothing.
template <int COUNT>
__device__ __forceinline__ void load_numbers(float* shared, const float* numbers, int first, int limit) {
    for (int i = threadIdx.x; i < COUNT; i += THREADS)
        copy_async_4(shared + i, numbers + (first + i < limit ? first + i : 0), first + i < limit);
}

// dK and dV of the keys begin … of one key/value head: over the query heads that share it and their queries, in order.
__device__ __forceinline__ void backward_keys_tile(const View<const bf16>& dout, const View<const bf16>& q,
                                                   const View<const bf16>& k, const View<const bf16>& v,
                                                   const float* lse, const float* delta, const View<bf16>& dk,
                                                   const View<bf16>& dv, const Sizes& n, const float* coordinates,
                                                   const float* term_weights, int b, int kv, int begin,
                                                   unsigned char* shared) {
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
    key_sums.clear();
    value_sums.clear();
    keys.load(k.at(b, kv), k.row, begin, n.keys, n.wide);
    values.load(v.at(b, kv), v.row, begin, n.keys, n.wide);
    if (steps > 0) start(0);
    copy_async_commit();
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) start(step + 1);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        const int h = kv * n.group() + step / tiles, first = (skipped + step % tiles) * KEYS_QUERIES;
        const Tile<KEYS_QUERIES> queries = {stage_of(step)}, douts = {stage_of(step) + tile_bytes(KEYS_QUERIES)};
        const ScoreTerms terms(coordinates, term_weights, n, b, h);
        Accumulator<M, N> scores, dweights;
        row_products(scores, keys, row, queries);
        finish_scores<true>(scores, n, terms, first, begin + row);
        row_products(dweights, values, row, douts);
        backward_scores(scores, dweights, numbers_of(step), numbers_of(step) + KEYS_QUERIES, exponent_factor(n));
        weighted_rows(value_sums, scores, douts);
        weighted_rows(key_sums, dweights, queries);
        __syncthreads();  // the stage may be overwritten
    }
    float scales[M][2], ones[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) scales[m][0] = scales[m][1] = n.scale, ones[m][0] = ones[m][1] = 1.0f;
    store_rows(dk.at(b, kv), dk.row, begin + row, n.keys, key_sums, scales, n.wide);
    store_rows(dv.at(b, kv), dv.row, begin + row, n.keys, value_sums, ones, n.wide);
}
