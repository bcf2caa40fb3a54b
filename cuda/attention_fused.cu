// Attention's whole backward in one kernel: S and dP are computed once, five products where attention.cu's two kernels
// need seven. δ, the forward, and the sum over blocks of the score terms' gradients are attention.cu's.
//
//   attention_backward_fused    P = exp(S − lse),  dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P∘(dP − δ),  dK = scale·dSᵀ Q,
//                               dQ = scale·dS K, and per tile of keys and query head Σ dS·∂term/∂scalar
//
// Shapes, dtypes, strides, mask, -DHEAD_SIZE, the score terms and the symmetry: attention.cu; gradients of points: only
// there. query_sums: fp32 of our own layout, room for every tile of queries (bf16 only: in fp32 the sums stand in dq
// itself). turns: 1 + B·H·(tiles of queries) counters, all 0 before the launch and all 0 after it.
// Work: a block per tile of keys of one key/value head, as attention_backward_keys: dK and dV stay in registers over
//   the query heads of its group and their tiles of queries. dQ of a tile of queries is a sum over blocks: each adds
//   its part to query_sums in memory when its turn comes. Layouts: attention_fused_bfloat16.cuh,
//   attention_fused_float32.cuh.
// Order: the tiles of keys add to a tile of queries from the last one down to tile 0, which scales and stores dQ. The
//   first writes instead of adding, so nothing needs clearing; the last sets the counter back to 0. With a causal mask
//   a block starts at its own diagonal, where it is the first to add, and stays as many steps behind its predecessor as
//   a tile of keys has tiles of queries. Without a mask all start at the first queries: the last one waits a step for
//   each.
// No deadlock: a block draws its tile by a ticket when it starts to run, the last tile of keys first. So a block waits
//   only for blocks that drew before it, which are running or done; of those that run, the first drawn waits for
//   nobody.
// Operations: five products of 2·B·H·T·S·D each (half when causal). Traffic: as attention_backward_keys, and query_sums
//   read and written once per tile of keys, 8·D bytes a row, mostly in the L2.
// Deterministic: every sum is made in one order, whichever block comes first; atomics only count tickets and turns.
// After a launch that did not end, counters stand anywhere: the launcher then forgets them (Launcher.counters).
// Sources: Dao 2023, "FlashAttention-2", section 3.1 (five products, a block per tile of keys); the turns:
//   FlashAttention-3's deterministic backward.
#include "attention_fused.cuh"
#ifdef CLLM_BF16
#include "attention_fused_bfloat16.cuh"
#else
#include "attention_fused_float32.cuh"
#endif

struct BackwardFusedParams {
    View<const real> dout, q, k, v;
    const float *lse, *delta;
    View<real> dq, dk, dv;
    float* query_sums;
    unsigned* turns;
    float* term_partials;
    TermInputs terms;
    SymmetryInputs symmetry;
    Sizes sizes;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) ENTRY(attention_backward_fused)(
    const __grid_constant__ BackwardFusedParams params) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ unsigned drawn;
    if (threadIdx.x == 0) drawn = atomicInc(params.turns, gridDim.x - 1);  // 0 again after the last block
    __syncthreads();
    const Sizes& n = params.sizes;
    const int tiles = (n.keys + TILE_KEYS - 1) / TILE_KEYS, tile = tiles - 1 - int(drawn % tiles);
    const int kv = drawn / tiles % n.kv_heads, b = drawn / tiles / n.kv_heads;
    const Symmetry symmetry(params.symmetry, n.keys, b);
    backward_fused_tile(params.dout, params.q, params.k, params.v, params.lse, params.delta, params.dq, params.dk,
                        params.dv, params.query_sums, params.turns + 1, n, params.terms, symmetry,
                        params.term_partials, b, kv, tile, shared);
}
