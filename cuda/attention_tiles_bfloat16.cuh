// Pieces of the bf16 attention kernels on tensor cores (mma.sync m16n8k16, fp32 accumulators): tiles in shared memory,
// products of tiles, and what happens to a tile of scores. Each kernel's own file sets THREADS before it includes this
// one, and makes its loops of these pieces.
//
// Shared memory: a tile is pages of 64 columns, 128 bytes a row; the 16-byte chunk c of row r stands at c XOR (r mod
// 8), so that ldmatrix, plain and transposed, and cp.async all touch every bank once.
#pragma once
#include "attention.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int PADDED = (D + 15) / 16 * 16;
constexpr int PAGES = (PADDED + 63) / 64;
constexpr int D_STEPS = PADDED / 16;  // k-steps of a product over the head size
constexpr int D_TILES = PADDED / 8;   // n-tiles of a product that gives head columns
constexpr int CHUNKS = PADDED / 8;    // 16-byte chunks of a row

__device__ constexpr int tile_bytes(int rows) { return PAGES * rows * 128; }

// `ROWS` rows of an operand in shared memory.
template <int ROWS>
struct Tile {
    unsigned char* base;

    // Address of the 16-byte chunk `chunk` (8 columns) of a row.
    __device__ __forceinline__ unsigned char* at(int row, int chunk) const {
        return base + (chunk / 8 * ROWS + row) * 128 + ((chunk % 8) ^ (row % 8)) * 16;
    }

    // Starts the copy of rows first … of an operand: zeros from `limit` on and in the padding. Without 16-byte accesses
    // (wide = 0) the copy is complete at once. Thread i takes chunks i, i + THREADS, …
    __device__ __forceinline__ void load(const bf16* rows_of, i64 stride, int first, int limit, int wide) const {
        constexpr int STEP = THREADS / CHUNKS;
        if (wide && THREADS % CHUNKS == 0 && STEP % 8 == 0 && ROWS % STEP == 0) {
            // a thread's chunks stand below each other, whole patterns of the swizzle apart
            const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
            unsigned char* const to = at(row, chunk);
            const bf16* from = rows_of + (first + row) * stride + chunk * 8;
#pragma unroll
            for (int i = 0; i < ROWS; i += STEP, from += STEP * stride) {
                const bool inside = first + row + i < limit && chunk * 8 < D;
                copy_async_16(to + i * 128, inside ? from : rows_of, inside);
            }
            return;
        }
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

// Of two neighbouring 16×8 tiles a lane holds columns 2t, 2t + 1 of each (packed: `low`, `high`). The four lanes of a
// row trade words, so that lane t gets four neighbouring columns: those from 4·(t mod 2) on of tile t / 2.
__device__ __forceinline__ uint2 neighbouring_columns(u32 low, u32 high) {
    const int t = threadIdx.x % 4;
    const u32 own = t < 2 ? low : high, other = __shfl_xor_sync(FULL_WARP, t < 2 ? high : low, 2);
    const bool outer = t == 0 || t == 3;  // keeps its own word, hands on the one it was given
    const u32 kept = outer ? own : other, got = __shfl_xor_sync(FULL_WARP, outer ? other : own, 1);
    return t % 2 == 0 ? make_uint2(kept, got) : make_uint2(got, kept);
}

// rows_of[row + …] = acc·factor for the rows below `limit`, columns from tile `first_tile` on; factors[m][half] belongs
// to rows 16·m + 8·half + g. With 16-byte accesses (wide) the lanes of a row write whole 32-byte sectors.
template <int M, int N>
__device__ __forceinline__ void store_rows(bf16* rows_of, i64 stride, int row, int limit, const Accumulator<M, N>& acc,
                                           const float (&factors)[M][2], int wide, int first_tile = 0) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = row + 16 * m + 8 * half + g;
            bf16* const p = rows_of + (at < limit ? at * stride : 0);
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                u32 words[2];
#pragma unroll
                for (int i = 0; i < 2; i++)
                    words[i] = pack_bf16(acc.v[m][n + i][2 * half] * factors[m][half],
                                         acc.v[m][n + i][2 * half + 1] * factors[m][half]);
                if (wide) {
                    const uint2 four = neighbouring_columns(words[0], words[1]);
                    const int column = 8 * (first_tile + n + t / 2) + t % 2 * 4;
                    if (at < limit && column < D) *reinterpret_cast<uint2*>(p + column) = four;
                } else {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int column = 8 * (first_tile + n + i) + 2 * t;
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

// What a raw score, with its terms, is multiplied by to be an exponent of 2; and what the terms are divided by before.
__device__ __forceinline__ float exponent_factor(const Sizes& n) { return n.scale * LOG2E; }
__device__ __forceinline__ float term_unit(const Sizes& n) { return n.scale; }

// The query and the key of element i of half `half` of the 16×8 tile (m, tile) of scores whose rows begin at query t
// and columns at key j; TRANSPOSED: rows at key j, columns at query t.
template <bool TRANSPOSED>
struct Place {
    int query, key;

    __device__ __forceinline__ Place(int t, int j, int m, int half, int tile, int i) {
        const int row = 16 * m + 8 * half + threadIdx.x % 32 / 4, column = 8 * tile + 2 * (threadIdx.x % 4) + i;
        query = t + (TRANSPOSED ? column : row);
        key = j + (TRANSPOSED ? row : column);
    }
};

typedef float Four[2][2];                // numbers of two queries and two keys: [query][key]
typedef const ScoreTerms::Token Two[2];  // two queries, or two keys

// Calls take(x, queries, keys, m) for the two queries and two keys whose scores x a thread holds of every 16×8
// tile (m, …); what is left in x goes back. Every lane of the warp.
template <bool TRANSPOSED, int M, int N, class F>
__device__ __forceinline__ void for_pairs(Accumulator<M, N>& scores, const ScoreTerms& terms, int t, int j, F take) {
    ScoreTerms::Token rows[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Place<TRANSPOSED> at(t, j, m, half, 0, 0);
            rows[m][half] = TRANSPOSED ? terms.key(at.key) : terms.query(at.query);
        }
    }
#pragma unroll
    for (int tile = 0; tile < N; tile++) {
        ScoreTerms::Token columns[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Place<TRANSPOSED> at(t, j, 0, 0, tile, i);
            columns[i] = TRANSPOSED ? terms.query(at.query) : terms.key(at.key);
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
            float(&v)[4] = scores.v[m][tile];
            constexpr int RIGHT = TRANSPOSED ? 2 : 1, BELOW = TRANSPOSED ? 1 : 2;
            Four x = {{v[0], v[RIGHT]}, {v[BELOW], v[3]}};
            take(x, TRANSPOSED ? columns : rows[m], TRANSPOSED ? rows[m] : columns, m);
            v[0] = x[0][0], v[RIGHT] = x[0][1], v[BELOW] = x[1][0], v[3] = x[1][1];
        }
    }
}

// Raw products get the score terms, and become −∞ where a query does not see the key.
template <bool TRANSPOSED, int M, int N>
__device__ __forceinline__ void finish_scores(Accumulator<M, N>& scores, const Sizes& n, const ScoreTerms& terms, int t,
                                              int j) {
    constexpr int QUERIES = TRANSPOSED ? 8 * N : 16 * M, KEYS = TRANSPOSED ? 16 * M : 8 * N;
    if (SCORE_TERMS)
        for_pairs<TRANSPOSED>(scores, terms, t, j,
                              [&](Four& x, Two& queries, Two& keys, int) { terms.add_to(x, queries, keys); });
    if (t + QUERIES <= n.queries && j + KEYS <= n.keys && j + KEYS <= n.visible(t)) return;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int tile = 0; tile < N; tile++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const Place<TRANSPOSED> at(t, j, m, half, tile, i);
                    if (!n.exists(at.query, at.key)) scores.v[m][tile][2 * half + i] = -INFINITY_F;
                }
            }
        }
    }
}

// What the gradients of a tile of scores give the score terms' scalars.
template <bool TRANSPOSED, int M, int N>
__device__ __forceinline__ void add_term_gradients(ScoreTerms& terms, Accumulator<M, N>& dscores, int t, int j) {
    if (!SCORE_TERMS) return;
    for_pairs<TRANSPOSED>(dscores, terms, t, j,
                          [&](Four& dx, Two& queries, Two& keys, int) { terms.add_gradients(dx, queries, keys); });
}

// The gradients of the lattice points of a warp's rows: its queries, or its keys.
template <int M>
struct PointSums {
    float v[M][2][3] = {};

    // What the gradients of a tile of scores give.
    template <bool TRANSPOSED, int N>
    __device__ __forceinline__ void add(const ScoreTerms& terms, Accumulator<M, N>& dscores, int t, int j) {
        for_pairs<TRANSPOSED>(dscores, terms, t, j, [&](Four& dx, Two& queries, Two& keys, int m) {
            for (int i = 0; i < 2; i++)
                for (int k = 0; k < 2; k++)
                    terms.add_slope(v[m][TRANSPOSED ? k : i], TRANSPOSED ? -dx[i][k] : dx[i][k], queries[i], keys[k]);
        });
    }
    // Times the unit of the terms to partials (…, 3) from row `start` on; `row` is the first of the warp.
    __device__ __forceinline__ void store(float* partials, i64 start, int row, int limit, float unit) const {
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int axis = 0; axis < 3; axis++) {
                    const int at = row + 16 * m + 8 * half + g;
                    const float total = over_row_sum(v[m][half][axis]) * unit;
                    if (threadIdx.x % 4 == axis && at < limit) partials[(start + at) * 3 + axis] = total;
                }
            }
        }
    }
};

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

// Starts the copy of `COUNT` numbers of queries first … to shared memory, zeros from `limit` on: there Q and dO are
// zero too, so that whatever weight comes out adds nothing.
template <int COUNT>
__device__ __forceinline__ void load_numbers(float* shared, const float* numbers, int first, int limit) {
    for (int i = threadIdx.x; i < COUNT; i += THREADS)
        copy_async_4(shared + i, numbers + (first + i < limit ? first + i : 0), first + i < limit);
}
