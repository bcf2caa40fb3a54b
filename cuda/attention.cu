// Scaled dot-product attention, flash style: no T×S array exists, memory is linear in T.
//
//   forward              S = scale·Q Kᵀ + terms (masked),  P = softmax(S),  out = P V,  lse = log Σ_j exp(S_ij)
//   backward_delta       δ_i = Σ_d dout_id·out_id
//   backward_keys        P = exp(S − lse),  dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P∘(dP − δ),  dK = scale·dSᵀ Q
//   backward_queries     the same P and dS again,  dQ = scale·dS K, and per block Σ dS·∂term/∂scalar
//   pad_tokens           the tokens with what matches nothing around them, for the terms that compare tokens
//   terms_finish         gradients of the scalars += the sum of those over the blocks of a head
//   points_finish        gradients of the points += the sum over the heads of what backward_queries and _keys found
//
// q, out, dout, dq (B, T, H, D), k, v, dk, dv (B, S, K, D) real with strides of their own, K divides H; lse, delta
// (B, H, T) fp32. Queries are the last T of S positions; `causal`: query t sees keys 0 … S − T + t (needs S ≥ T).
// The lattice's score terms, chosen by -D, their inputs and their arithmetic: score_terms.cuh. -DHEAD_SIZE=D, D ≤ 128.
// The lattice's symmetry (symmetry.cuh) turns q and k as they arrive, and turns dq and dk back before they are stored.
// Work: a block of 128 threads per tile of queries (forward, backward_queries) or keys (backward_keys) of one head;
//   tiles of one head are neighbours in the grid, those with most work first. Layouts: attention_float32.cuh (FMA) and
//   attention_bfloat16.cuh (mma.sync m16n8k16 fed by ldmatrix and cp.async).
// Operations: forward 4·B·H·T·S·D, two products (half when causal); backward seven products, S and dP computed twice,
//   where attention_fused.cu needs five and lets blocks wait for one another. Traffic: the moving side is read once per
//   tile of the other, mostly from the L2.
// Arguments: one struct by value and a __grid_constant__, so that no thread makes a copy of it in local memory.
// Deterministic: every sum is made by one thread or a fixed tree, in the order of the positions; no atomics.
// Sources: Dao et al. 2022, "FlashAttention", appendix B; Dao 2023, "FlashAttention-2".
#include "attention.cuh"
#ifdef CLLM_BF16
#include "attention_bfloat16.cuh"
#else
#include "attention_float32.cuh"
#endif

struct ForwardParams {
    View<const real> q, k, v;
    View<real> out;
    float* lse;
    TermInputs terms;
    SymmetryInputs symmetry;
    Sizes sizes;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) ENTRY(attention_forward)(
    const __grid_constant__ ForwardParams params) {
    extern __shared__ __align__(128) unsigned char shared[];
    const Sizes& n = params.sizes;
    const int tiles = (n.queries + FORWARD_ROWS - 1) / FORWARD_ROWS;
    const int tile = tiles - 1 - int(blockIdx.x % tiles);
    const int h = blockIdx.x / tiles % n.heads, b = blockIdx.x / tiles / n.heads;
    const ScoreTerms terms = n.terms(params.terms, term_unit(n), b, h);
    const Symmetry symmetry(params.symmetry, n.keys, b);
    forward_tile(params.q, params.k, params.v, params.out, params.lse, n, terms, symmetry, b, h, tile * FORWARD_ROWS,
                 shared);
}

// Lanes of one row, four elements each: a power of two.
constexpr int DELTA_LANES = D > 64 ? 32 : D > 32 ? 16 : D > 16 ? 8 : 4;

struct DeltaParams {
    View<const real> dout, out;
    float* delta;
    long long rows;
    int heads, queries, wide;
};

// DELTA_LANES lanes per (batch item, position, head).
extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(attention_backward_delta)(
    const __grid_constant__ DeltaParams params) {
    const int heads = params.heads, queries = params.queries;
    const i64 i = (i64(blockIdx.x) * THREADS + threadIdx.x) / DELTA_LANES;
    const int h = int(i % heads), column = threadIdx.x % DELTA_LANES * 4;
    const i64 t = i / heads % queries, b = i / heads / queries;
    const real* const x = params.dout.at(b, h) + t * params.dout.row + column;
    const real* const y = params.out.at(b, h) + t * params.out.row + column;
    float sum = 0.0f;
    if (i < params.rows && params.wide && column < D) {
        const float4 u = load_float4(x), v = load_float4(y);
        sum = u.x * v.x + u.y * v.y + u.z * v.z + u.w * v.w;
    } else if (i < params.rows) {
        for (int d = 0; d < 4; d++)
            if (column + d < D) sum += to_float(x[d]) * to_float(y[d]);
    }
    for (int offset = DELTA_LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, offset);
    if (i < params.rows && column == 0) params.delta[(b * heads + h) * queries + t] = sum;
}

struct BackwardKeysParams {
    View<const real> dout, q, k, v;
    const float *lse, *delta;
    View<real> dk, dv;
    float* point_partials;
    TermInputs terms;
    SymmetryInputs symmetry;
    Sizes sizes;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) ENTRY(attention_backward_keys)(
    const __grid_constant__ BackwardKeysParams params) {
    extern __shared__ __align__(128) unsigned char shared[];
    const Sizes& n = params.sizes;
    const int tiles = (n.keys + TILE_KEYS - 1) / TILE_KEYS, tile = blockIdx.x % tiles;
    const int kv = blockIdx.x / tiles % n.kv_heads, b = blockIdx.x / tiles / n.kv_heads;
    const Symmetry symmetry(params.symmetry, n.keys, b);
    backward_keys_tile(params.dout, params.q, params.k, params.v, params.lse, params.delta, params.dk, params.dv, n,
                       params.terms, symmetry, params.point_partials, b, kv, tile * TILE_KEYS, shared);
}

struct BackwardQueriesParams {
    View<const real> dout, q, k, v;
    const float *lse, *delta;
    View<real> dq;
    float *term_partials, *point_partials;
    TermInputs terms;
    SymmetryInputs symmetry;
    Sizes sizes;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) ENTRY(attention_backward_queries)(
    const __grid_constant__ BackwardQueriesParams params) {
    extern __shared__ __align__(128) unsigned char shared[];
    const Sizes& n = params.sizes;
    const int tiles = (n.queries + BACKWARD_ROWS - 1) / BACKWARD_ROWS;
    const int tile = tiles - 1 - int(blockIdx.x % tiles);
    const int h = blockIdx.x / tiles % n.heads, b = blockIdx.x / tiles / n.heads;
    ScoreTerms terms = n.terms(params.terms, term_unit(n), b, h);
    const Symmetry symmetry(params.symmetry, n.keys, b);
    backward_queries_tile(params.dout, params.q, params.k, params.v, params.lse, params.delta, params.dq, n, terms,
                          symmetry, params.term_partials, params.point_partials, b, h, tile * BACKWARD_ROWS, shared);
}

// A thread per number: padded (B, 2, PAD_BEFORE + S + PAD_AFTER), `count` in all, from tokens (B, S), strided by batch:
// as the queries' and as the keys', so that what stands around the ones does not match what stands around the others.
extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(attention_pad_tokens)(
    const int* tokens, int* padded, long long tokens_batch, long long count, int keys) {
    const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    const int length = PAD_BEFORE + keys + PAD_AFTER, s = int(i % length) - PAD_BEFORE;
    const i64 row = i / length;
    padded[i] = s >= 0 && s < keys ? tokens[row / 2 * tokens_batch + s] : row % 2 == 0 ? NO_QUERY : NO_KEY;
}

// A warp per query head: gradients (H, TERM_COUNT) += Σ over batch items and tiles of partials (B, H, tiles,
// TERM_COUNT).
extern "C" __global__ void __launch_bounds__(32) ENTRY(attention_terms_finish)(
    const float* partials, gradient* gradients, int batch, int heads, int tiles) {
    const int h = blockIdx.x, term = threadIdx.x;
    if (term >= TERM_COUNT) return;
    float sum = to_float(gradients[h * TERM_COUNT + term]);
    for (int b = 0; b < batch; b++)
        for (int tile = 0; tile < tiles; tile++)
            sum += partials[((i64(b) * heads + h) * tiles + tile) * TERM_COUNT + term];
    store(gradients + h * TERM_COUNT + term, sum);
}

// A thread per coordinate of a position: gradients (B, S, 3), strided by batch, += Σ over the heads of of_queries
// (B, H, T, 3), those of the last T positions, and of_keys (B, K, S, 3).
extern "C" __global__ void __launch_bounds__(THREADS) ENTRY(attention_points_finish)(
    const float* of_queries, const float* of_keys, float* gradients, long long gradients_batch, long long count,
    int heads, int kv_heads, int queries, int keys) {
    const i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    const int axis = int(i % 3), s = int(i / 3 % keys), t = s - (keys - queries);
    const i64 b = i / 3 / keys;
    float* const to = gradients + b * gradients_batch + 3 * i64(s) + axis;
    float sum = *to;
    for (int h = 0; h < heads && t >= 0; h++) sum += of_queries[((b * heads + h) * queries + t) * 3 + axis];
    for (int h = 0; h < kv_heads; h++) sum += of_keys[((b * kv_heads + h) * keys + s) * 3 + axis];
    *to = sum;
}
