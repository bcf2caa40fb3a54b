// Attention's whole backward in one kernel: S and dP are computed once, five products where attention.cu's two kernels
// need seven. δ, the forward, and the sum over blocks of the score terms' gradients are attention.cu's.
//
//   attention_backward_fused    P = exp(S − lse),  dV = Pᵀ dO,  dP = dO Vᵀ,  dS = P∘(dP − δ),  dK = scale·dSᵀ Q,
//                               dQ = scale·dS K, and per tile of keys and query head Σ dS·∂term/∂scalar
//
// Shapes, dtypes, strides, mask, -DHEAD_SIZE, the score terms and the symmetry: attention.cu; gradients of points: only there. query_sums: fp32 of our own layout, room
// for every tile of queries (bf16 only: in fp32 the sums stand in dq itself). turns: 1 + B·H·(tiles of queries) counters,
// all 0 before the launch and all 0 after it.
// Work: a block per tile of keys of one key/value head, as attention_backward_keys: dK and dV stay in registers over the
//   query heads of its group and their tiles of queries. dQ of a tile of queries is a sum over blocks: each adds its part
//   to query_sums in memory when its turn comes. Layouts: attention_fused_bfloat16.cuh, attention_fused_float32.cuh.
// Order: the tiles of keys add to a tile of queries from the last one down to tile 0, which scales and stores dQ. The
//   first writes instead of adding, so nothing needs clearing; the last sets the counter back to 0. With a causal mask a
//   block starts at its own diagonal, where it is the first to add, and stays as many steps behind its predecessor as a
//   tile of keys has tiles of queries. Without a mask all start at the first queries: the last one waits a step for each.
// No deadlock: a block draws its tile by a ticket when it starts to run, the last tile of keys first. So a block waits
//   only for blocks that drew before it, which are running or done; of those that run, the first drawn waits for nobody.
// Operations: five products of 2·B·H·T·S·D each (half when causal). Traffic: as attention_backward_keys, and query_sums
//   read and written once per tile of keys, 8·D bytes a row, mostly in the L2.
// Deterministic: every sum is made in one order, whichever block comes first; atomics only count tickets and turns.
// After a launch that did not end, counters stand anywhere: the launcher then forgets them (Launcher.counters).
// Sources: Dao 2023, "FlashAttention-2", section 3.1 (five products, a block per tile of keys); the turns:
//   FlashAttention-3's deterministic backward.
// Resources, the most over all variants and sm_80, sm_90, sm_100 (written by bench/compiled/kernel_resources.py):
//   kernel                                     registers  shared  spilled
//   attention_backward_fused_bfloat16                255     128       40
//   attention_backward_fused_bfloat16+symmetry       255     128       24
//   attention_backward_fused_bfloat16+terms          255     128      228
//   attention_backward_fused_bfloat16+terms+symmetry       255     128      276
//   attention_backward_fused_float32                 203     128        0
//   attention_backward_fused_float32+symmetry        207     128        0
//   attention_backward_fused_float32+terms           236     128        0
//   attention_backward_fused_float32+terms+symmetry       227     128        0
#include "attention_fused.cuh"
#ifdef CLLM_BF16
#include "attention_fused_bfloat16.cuh"
#else
#include "attention_fused_float32.cuh"
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) ENTRY(attention_backward_fused)(
    const real* dout, const real* q, const real* k, const real* v, const float* lse, const float* delta, real* dq,
    real* dk, real* dv, float* query_sums, unsigned* turns, const int* padded,
    const float* points, const real* scalars, float* term_partials, long long padded_length, long long points_batch,
    long long dout_batch, long long dout_row, long long dout_head, long long q_batch,
    long long q_row, long long q_head, long long k_batch, long long k_row, long long k_head, long long v_batch,
    long long v_row, long long v_head, long long dq_batch, long long dq_row, long long dq_head, long long dk_batch,
    long long dk_row, long long dk_head, long long dv_batch, long long dv_row, long long dv_head, int heads,
    int kv_heads, int queries, int keys, int causal, int wide, float scale, const int* tokens, long long tokens_batch,
    const float* element_turns) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ unsigned drawn;
    if (threadIdx.x == 0) drawn = atomicInc(turns, gridDim.x - 1);  // 0 again after the last block
    __syncthreads();
    const Sizes sizes = {heads, kv_heads, queries, keys, causal, wide, scale};
    const int tiles = (keys + TILE_KEYS - 1) / TILE_KEYS;
    const int tile = tiles - 1 - int(drawn % tiles), kv = drawn / tiles % kv_heads, b = drawn / tiles / kv_heads;
    const Symmetry symmetry({tokens, element_turns, tokens_batch}, keys, b);
    backward_fused_tile({dout, dout_batch, dout_row, dout_head}, {q, q_batch, q_row, q_head},
                        {k, k_batch, k_row, k_head}, {v, v_batch, v_row, v_head}, lse, delta,
                        {dq, dq_batch, dq_row, dq_head}, {dk, dk_batch, dk_row, dk_head},
                        {dv, dv_batch, dv_row, dv_head}, query_sums, turns + 1, sizes,
                        {padded, points, scalars, padded_length, points_batch}, symmetry, term_partials, b, kv, tile,
                        shared);
}
