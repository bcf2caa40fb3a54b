// The fused attention backward in bf16 on tensor cores. Included by attention_fused.cu, which says what is computed.
//
// 128 keys a block; a warp owns 16·KEYS_M of them and meets all queries of a tile, as in attention_bfloat16.cuh:
//   Sᵀ = K Qᵀ, dPᵀ = V dOᵀ; dV += Pᵀ dO, dK += dSᵀ Q, the weights straight from the accumulators
// and for dQ, a sum over all keys of the block, dSᵀ goes through shared memory, packed to bf16: a row of 128 bytes for
// each key, swizzled as the tiles are. Each warp then makes one part of dQ = dS K, 16 queries by PART_TILES·8 columns.
// Q and dO are double-buffered. The running sums of dQ lie in memory as the accumulators do: 16 bytes a lane, whole
// lines.
#pragma once
#include "attention_fused.cuh"

constexpr bool NARROW = D <= 64 && !POINTS;  // the points take registers, too
constexpr int THREADS = NARROW ? 128 : 256;

#include "attention_tiles_bfloat16.cuh"
#include "symmetry_bfloat16.cuh"

// The most that the registers hold (cllm_gpu.ops.cuda.attention_fused knows the same numbers).
constexpr int KEYS_M = NARROW ? 2 : 1, QUERIES_N = D <= 64 || POINTS ? 4 : 8;
constexpr int TILE_KEYS = WARPS * 16 * KEYS_M, TILE_QUERIES = 8 * QUERIES_N;
constexpr int ROW_PARTS = TILE_QUERIES / 16, COLUMN_PARTS = WARPS / ROW_PARTS;
constexpr int PART_TILES = (D_TILES / 2 + COLUMN_PARTS - 1) / COLUMN_PARTS * 2;
constexpr int PART_FLOATS4 = THREADS * PART_TILES;  // running sums of one tile of queries, in float4
static_assert(ROW_PARTS * COLUMN_PARTS == WARPS && TILE_QUERIES <= 64, "a part for each warp, a page for dS");

constexpr int STAGE = 2 * tile_bytes(TILE_QUERIES) + 2 * 4 * TILE_QUERIES;  // Q, dO, and lse and δ of its queries
constexpr int SHARED = 2 * tile_bytes(TILE_KEYS) + 2 * STAGE + TILE_KEYS * 128;

// The accumulators to shared memory, packed: `row` is the first of the warp's rows. At most 64 columns.
template <int M, int N>
__device__ __forceinline__ void store_packed(const Tile<TILE_KEYS>& tile, int row, const Accumulator<M, N>& acc) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < N; n++)
                *reinterpret_cast<u32*>(tile.at(row + 16 * m + 8 * half + g, n) + 4 * t) =
                    pack_bf16(acc.v[m][n][2 * half], acc.v[m][n][2 * half + 1]);
}

// acc = 16 rows (those from column `column` of the transposed weights on) of weights · b, columns from tile
// `first_tile` on. Tiles beyond the head size stay zero.
__device__ __forceinline__ void transposed_weighted_rows(Accumulator<1, PART_TILES>& acc,
                                                         const Tile<TILE_KEYS>& weights,
                                                         int column, const Tile<TILE_KEYS>& b, int first_tile) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    acc.clear();
#pragma unroll
    for (int k = 0; k < TILE_KEYS / 16; k++) {
        u32 left[4];
        load_matrix_x4_trans(left, weights.at(16 * k + matrix / 2 * 8 + r, column / 8 + matrix % 2));
#pragma unroll
        for (int n = 0; n < PART_TILES; n += 2) {
            if (first_tile + n >= D_TILES) continue;
            u32 right[4];
            load_matrix_x4_trans(right, b.at(16 * k + matrix % 2 * 8 + r, first_tile + n + matrix / 2));
            mma_bf16(acc.v[0][n], left, right[0], right[1]);
            mma_bf16(acc.v[0][n + 1], left, right[2], right[3]);
        }
    }
}

// The block's part of dQ of one tile of queries, in its turn. `sums`: the running sums of that tile.
__device__ __forceinline__ void add_queries(const Tile<TILE_KEYS>& dscores, const Tile<TILE_KEYS>& keys,
                                            const Turn& turn, float4* sums, bf16* rows_of, i64 stride, int first,
                                            const Sizes& n, const Symmetry& symmetry) {
    const int warp = threadIdx.x / 32, row = warp % ROW_PARTS * 16, first_tile = warp / ROW_PARTS * PART_TILES;
    turn.wait();  // its barrier is the one between writing and reading dS, too
    float4 earlier[PART_TILES];
#pragma unroll
    for (int i = 0; i < PART_TILES; i++) {
        earlier[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (turn.place > 0 && first_tile + i < D_TILES) earlier[i] = __ldcg(sums + i * THREADS + threadIdx.x);
    }
    Accumulator<1, PART_TILES> part;
    transposed_weighted_rows(part, dscores, row, keys, first_tile);
#pragma unroll
    for (int i = 0; i < PART_TILES; i++) {
        float(&v)[4] = part.v[0][i];
        v[0] += earlier[i].x, v[1] += earlier[i].y, v[2] += earlier[i].z, v[3] += earlier[i].w;
        if (!turn.final && first_tile + i < D_TILES)
            __stcg(sums + i * THREADS + threadIdx.x, make_float4(v[0], v[1], v[2], v[3]));
    }
    const float scale[1][2] = {{n.scale, n.scale}};
    if (turn.final) {
        turn_back(part, symmetry, n.position(first + row), first_tile);
        store_rows(rows_of, stride, first + row, n.queries, part, scale, n.wide, first_tile);
    }
    turn.pass();  // its barrier lets the stage and dS be overwritten, too
}

// What a step needs of one tile of queries, in shared memory.
struct Stage {
    unsigned char* base;

    __device__ __forceinline__ Tile<TILE_QUERIES> queries() const { return {base}; }
    __device__ __forceinline__ Tile<TILE_QUERIES> douts() const { return {base + tile_bytes(TILE_QUERIES)}; }
    __device__ __forceinline__ float* lse() const {
        return reinterpret_cast<float*>(base + 2 * tile_bytes(TILE_QUERIES));
    }
    __device__ __forceinline__ float* delta() const { return lse() + TILE_QUERIES; }

    // Starts the copy of the queries first … of head h. all_lse, all_delta: those of all heads.
    __device__ __forceinline__ void load(const View<const bf16>& q, const View<const bf16>& dout, const float* all_lse,
                                         const float* all_delta, const Sizes& n, int b, int h, int first) const {
        const i64 rows = (i64(b) * n.heads + h) * n.queries;
        queries().load(q.at(b, h), q.row, first, n.queries, n.wide);
        douts().load(dout.at(b, h), dout.row, first, n.queries, n.wide);
        load_numbers<TILE_QUERIES>(lse(), all_lse + rows, first, n.queries);
        load_numbers<TILE_QUERIES>(delta(), all_delta + rows, first, n.queries);
    }
};

// dK and dV of the keys of one tile of one key/value head, and its part of dQ of every query that sees them.
__device__ __forceinline__ void backward_fused_tile(View<const bf16> dout, View<const bf16> q, View<const bf16> k,
                                                    View<const bf16> v, const float* lse, const float* delta,
                                                    View<bf16> dq, View<bf16> dk, View<bf16> dv, float* query_sums,
                                                    u32* turns, Sizes n, TermInputs given, const Symmetry& symmetry,
                                                    float* term_partials, int b, int kv, int tile,
                                                    unsigned char* shared) {
    constexpr int M = KEYS_M, N = QUERIES_N;
    const Tile<TILE_KEYS> keys = {shared}, values = {shared + tile_bytes(TILE_KEYS)};
    const Tile<TILE_KEYS> dscores = {shared + 2 * tile_bytes(TILE_KEYS)};
    unsigned char* const stages = dscores.base + TILE_KEYS * 128;
    const int row = threadIdx.x / 32 * 16 * M, begin = tile * TILE_KEYS, past_heads = (kv + 1) * n.group();
    const int query_tiles = (n.queries + TILE_QUERIES - 1) / TILE_QUERIES;
    const int key_tiles = (n.keys + TILE_KEYS - 1) / TILE_KEYS;
    const int skipped = n.first_query(begin) / TILE_QUERIES;  // tiles of queries that see none of the keys
    Accumulator<M, D_TILES> key_sums, value_sums;
    key_sums.clear();
    value_sums.clear();
    ScoreTerms terms = n.terms(given, term_unit(n), b, kv * n.group());
    keys.load(k.at(b, kv), k.row, begin, n.keys, n.wide);
    values.load(v.at(b, kv), v.row, begin, n.keys, n.wide);
    int h = kv * n.group(), at = skipped, parity = 0;
    if (at < query_tiles) Stage{stages}.load(q, dout, lse, delta, n, b, h, at * TILE_QUERIES);
    copy_async_commit();
    turn_arrived(keys, symmetry, begin);
    while (h < past_heads && at < query_tiles) {  // there may be no query at all
        const bool head_ends = at + 1 == query_tiles;
        const int next_h = head_ends ? h + 1 : h, next = head_ends ? skipped : at + 1, first = at * TILE_QUERIES;
        const Stage stage = {stages + parity * STAGE};
        parity ^= 1;
        if (next_h < past_heads)
            Stage{stages + parity * STAGE}.load(q, dout, lse, delta, n, b, next_h, next * TILE_QUERIES);
        copy_async_commit();
        copy_async_wait<1>();
        turn_rows(stage.queries(), symmetry, n.position(first));
        __syncthreads();
        if (at == skipped) terms = n.terms(given, term_unit(n), b, h);
        Accumulator<M, N> scores, dweights;
        row_products(scores, keys, row, stage.queries());
        finish_scores<true>(scores, n, terms, first, begin + row);
        row_products(dweights, values, row, stage.douts());
        backward_scores(scores, dweights, stage.lse(), stage.delta(), exponent_factor(n));
        add_term_gradients<true>(terms, dweights, first, begin + row);
        store_packed(dscores, row, dweights);
        weighted_rows(value_sums, scores, stage.douts());
        weighted_rows(key_sums, dweights, stage.queries());
        const i64 head = i64(b) * n.heads + h;
        const Turn turn(turns + head * query_tiles + at, n, first + TILE_QUERIES - 1, tile, TILE_KEYS);
        float4* const sums = reinterpret_cast<float4*>(query_sums) + (head * query_tiles + at) * PART_FLOATS4;
        add_queries(dscores, keys, turn, sums, dq.at(b, h), dq.row, first, n, symmetry);
        if (head_ends) terms.finish(term_partials, head * key_tiles + tile, reinterpret_cast<float*>(dscores.base));
        h = next_h, at = next;
    }
    float scales[M][2], ones[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) scales[m][0] = scales[m][1] = n.scale, ones[m][0] = ones[m][1] = 1.0f;
    turn_back(key_sums, symmetry, begin + row);
    store_rows(dk.at(b, kv), dk.row, begin + row, n.keys, key_sums, scales, n.wide);
    store_rows(dv.at(b, kv), dv.row, begin + row, n.keys, value_sums, ones, n.wide);
}
