// Token and position embeddings, and their gradients without atomics.
//
//   forward     out[n] = E[token(n)] + P[first_position + n mod T], times mask/(1 − rate) where there is dropout
//   positions   dP[t] (+)= Σ_b dout[b·T + t]
//   backward    dE[v] (+)= Σ dout[n] over the n whose token is v, in the order of n
//
// tokens (N) int32; out, dout (N, C) real; E (V, C), P (positions, C) real; dE, dP gradient.
// Backward: `order` (N) int64 sorts the positions stably by token. A segment of SEGMENT sorted positions and a tile of
//   256 columns belong to a block; a run of equal tokens inside a segment is summed and added to dE at once. A run that
//   crosses segments leaves partial sums: `tails` (segments, C) where it starts, `heads` (segments, C) in those it goes
//   on in; embedding_backward_join adds them in order, one block per segment with such a start. All fp32.
// The mask has no backward here: who computes dout applies it (layernorm_backward does).
// Work: a thread per column (a pack of columns forward). Traffic: forward 2 reads, 1 write; a mask costs 10 rounds of
//   Philox per 4 elements; backward 1 read, and a read and a write per token that occurs.
// Deterministic: every sum has one order. Source: sort and segment, as in Hillis & Steele 1986, "Data parallel
//   algorithms".
#include "dropout.cuh"

constexpr int SEGMENT = 64;

struct ForwardParams {
    const int* tokens;
    const real *token_embedding, *position_embedding;
    real* out;
    long long rows;
    int length, columns, first_position, wide;
    Mask dropout;
};

template <int W>
__device__ __forceinline__ void gather(const ForwardParams& params) {
    const int columns = params.columns, packs = columns / W;
    const index_t i = index_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= params.rows * packs) return;
    const index_t row = i / packs;
    const int column = int(i % packs) * W;
    Pack<W> y = load_pack<W>(params.token_embedding + index_t(params.tokens[row]) * columns + column);
    if (params.position_embedding != nullptr) {
        const index_t position = params.first_position + row % params.length;
        const Pack<W> p = load_pack<W>(params.position_embedding + position * columns + column);
#pragma unroll
        for (int k = 0; k < W; k++) y.v[k] += p.v[k];
    }
    params.dropout.apply<W>(y, row * columns + column);
    store_pack<W>(params.out + row * columns + column, y);
}

extern "C" __global__ void __launch_bounds__(256) ENTRY(embedding_forward)(
    const __grid_constant__ ForwardParams params) {
    if (params.wide)
        gather<WIDE<real>>(params);
    else
        gather<1>(params);
}

extern "C" __global__ void __launch_bounds__(256) ENTRY(embedding_backward_positions)(
    const real* dout, gradient* dposition_embedding, int batch, int length, int columns, int accumulate) {
    const index_t i = index_t(blockIdx.x) * blockDim.x + threadIdx.x, plane = index_t(length) * columns;
    if (i >= plane) return;
    float sum = accumulate ? to_float(dposition_embedding[i]) : 0.0f;
    for (int b = 0; b < batch; b++) sum += to_float(dout[b * plane + i]);
    store(dposition_embedding + i, sum);
}

// Adds `sum` to one element of dE.
__device__ __forceinline__ void add_to(gradient* p, float sum) { store(p, to_float(*p) + sum); }

extern "C" __global__ void __launch_bounds__(256) ENTRY(embedding_backward)(
    const real* dout, const int* tokens, const long long* order, gradient* dtoken_embedding, float* heads,
    float* tails, long long rows, int columns) {
    __shared__ i64 places[SEGMENT];
    __shared__ int values[SEGMENT + 2];  // the tokens of the segment, and the ones before and after it (-1: none)
    const index_t begin = index_t(blockIdx.x) * SEGMENT;
    const int count = rows - begin < SEGMENT ? int(rows - begin) : SEGMENT;
    for (int i = threadIdx.x; i < count + 2; i += blockDim.x) {
        const index_t at = begin + i - 1;
        const bool exists = at >= 0 && at < rows;
        const i64 place = exists ? order[at] : 0;
        values[i] = exists ? tokens[place] : -1;
        if (i >= 1 && i <= count) places[i - 1] = place;
    }
    __syncthreads();
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    const index_t partial = index_t(blockIdx.x) * columns + column;
    float sum = 0.0f;
    bool from_before = values[0] == values[1];
    for (int i = 0; i < count; i++) {
        sum += to_float(dout[places[i] * columns + column]);
        const int token = values[i + 1];
        const bool ends = values[i + 2] != token;
        if (!ends && i + 1 < count) continue;
        if (from_before)
            heads[partial] = sum;
        else if (ends)
            add_to(dtoken_embedding + index_t(token) * columns + column, sum);
        else
            tails[partial] = sum;
        sum = 0.0f;
        from_before = false;
    }
}

extern "C" __global__ void __launch_bounds__(256) ENTRY(embedding_backward_join)(
    const int* tokens, const long long* order, gradient* dtoken_embedding, const float* heads, const float* tails,
    long long rows, int columns) {
    const index_t begin = index_t(blockIdx.x) * SEGMENT, end = begin + SEGMENT;
    if (end >= rows) return;  // the last segment: nothing goes on
    const int token = tokens[order[end - 1]];
    if (tokens[order[end]] != token) return;
    // the run began before this segment when it fills it and goes on from the one before
    if (begin > 0 && tokens[order[begin]] == token && tokens[order[begin - 1]] == token) return;
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    float sum = tails[index_t(blockIdx.x) * columns + column];
    for (index_t segment = blockIdx.x + 1; segment * SEGMENT < rows; segment++) {
        if (tokens[order[segment * SEGMENT]] != token) break;
        sum += heads[segment * columns + column];
        const index_t last = (segment + 1) * SEGMENT - 1;
        if (last >= rows || tokens[order[last]] != token) break;  // the run ended inside this segment
    }
    add_to(dtoken_embedding + index_t(token) * columns + column, sum);
}
