// Layer norm, alone and behind the residual addition, and its backward.
//
//   forward     mean = Σ x / C,  rstd = 1 / √(Σ (x − mean)² / C + ε),  out = (x − mean)·rstd·weight + bias
//   residual    r = residual + branch·mask/(1 − rate) first, written to residual_out; then the forward of r
//   backward    x̂ = (x − mean)·rstd,  g = dout·weight
//               dx = rstd·(g − Σ g / C − x̂·Σ g·x̂ / C) (+ dresidual),  dbranch = dx·mask/(1 − rate) unless null
//               dweight = Σ_rows dout·x̂,  dbias = Σ_rows dout: partial sums here, finished by column_sum_finish
//
// x, out, residual, branch, dout, dx, dbranch (N, C) real; dbranch may be dout or dx; weight, bias (C) real; mean, rstd
// (N) fp32; partials (2, chunks, C) fp32: of dweight, then of dbias.
// Work: a row belongs to `row_threads` threads: to one warp (C up to 1024; the warps of a block take different rows),
//   or to the whole block. A thread keeps up to KEPT elements of its row in registers; what is beyond is read again.
// Traffic per element: forward 1 read, 1 write; residual 2 reads, 2 writes; backward 2 reads (3 with dresidual), 1
//   write (2 with dbranch). A mask costs 10 rounds of Philox per 4 elements.
// Deterministic: every sum has one order, fixed by N and C.
// Source: Ba, Kiros, Hinton 2016, "Layer normalization"; two-pass variance.
#include "dropout.cuh"

constexpr int KEPT = 32;
// Packs of W elements a thread keeps; fewer where rows cannot be read 16 bytes at a time.
template <int W>
constexpr int KEPT_PACKS = W == 1 ? 8 : KEPT / W;

// Sum over the threads of a row; every one gets it. `exchange`: 32 floats of shared memory, free to be overwritten.
__device__ __forceinline__ float row_sum(float x, int row_threads, float* exchange) {
    x = warp_sum(x);
    if (row_threads == 32) return x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = row_threads / 32;
    __syncthreads();  // the last use of `exchange` is over
    if (lane == 0) exchange[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? exchange[lane] : 0.0f);
}

// The packs of one row that belong to one thread: pack i begins at column (i·row_threads + thread)·W.
template <int W>
struct RowPart {
    static constexpr int PACKS = KEPT_PACKS<W>;
    Pack<W> kept[PACKS];
    int first, step, columns;

    __device__ RowPart(int thread, int row_threads, int columns)
        : first(thread * W), step(row_threads * W), columns(columns) {}

    // Keep the row that `read(column)` gives.
    template <class Read>
    __device__ __forceinline__ void fill(Read read) {
#pragma unroll
        for (int i = 0; i < PACKS; i++)
            if (first + i * step < columns) kept[i] = read(first + i * step);
    }

    // Call use(pack, column) for every pack; those not kept come from `read(column)` again.
    template <class Read, class Use>
    __device__ __forceinline__ void visit(Read read, Use use) const {
#pragma unroll
        for (int i = 0; i < PACKS; i++)
            if (first + i * step < columns) use(kept[i], first + i * step);
        visit_rest([&](int column) { use(read(column), column); });
    }

    // Call use(column) for the packs that are not kept.
    template <class Use>
    __device__ __forceinline__ void visit_rest(Use use) const {
        for (int column = first + PACKS * step; column < columns; column += step) use(column);
    }
};

// Normalise one row given by `read`; the threads of the row call it together.
template <int W, class Read>
__device__ __forceinline__ void normalise(const RowPart<W>& part, Read read, const real* weight, const real* bias,
                                          real* out, float* mean_out, float* rstd_out, float epsilon, int thread,
                                          int row_threads, float* exchange) {
    float sum = 0.0f;
    part.visit(read, [&](const Pack<W>& x, int) {
#pragma unroll
        for (int i = 0; i < W; i++) sum += x.v[i];
    });
    const float mean = row_sum(sum, row_threads, exchange) / part.columns;
    float squares = 0.0f;
    part.visit(read, [&](const Pack<W>& x, int) {
#pragma unroll
        for (int i = 0; i < W; i++) squares += (x.v[i] - mean) * (x.v[i] - mean);
    });
    const float rstd = 1.0f / sqrtf(row_sum(squares, row_threads, exchange) / part.columns + epsilon);
    part.visit(read, [&](const Pack<W>& x, int column) {
        const Pack<W> w = load_pack<W>(weight + column);
        Pack<W> b = {}, y;
        if (bias != nullptr) b = load_pack<W>(bias + column);
#pragma unroll
        for (int i = 0; i < W; i++) y.v[i] = (x.v[i] - mean) * rstd * w.v[i] + b.v[i];
        store_pack<W>(out + column, y);
    });
    if (thread == 0) {
        *mean_out = mean;
        *rstd_out = rstd;
    }
}


template <int W>
__device__ __forceinline__ void forward_row(const real* x, const real* weight, const real* bias, real* out,
                                            float* mean, float* rstd, int columns, float epsilon, int row_threads,
                                            float* exchange) {
    const int thread = threadIdx.x % row_threads;
    RowPart<W> part(thread, row_threads, columns);
    const auto read = [&](int column) { return load_pack<W>(x + column); };
    part.fill(read);
    normalise<W>(part, read, weight, bias, out, mean, rstd, epsilon, thread, row_threads, exchange);
}

extern "C" __global__ void __launch_bounds__(512) ENTRY(layernorm_forward)(
    const real* x, const real* weight, const real* bias, real* out, float* mean, float* rstd, long long rows,
    int columns, float epsilon, int row_threads, int wide) {
    __shared__ float exchange[32];
    const index_t row = index_t(blockIdx.x) * (blockDim.x / row_threads) + threadIdx.x / row_threads;
    if (row >= rows) return;  // whole warps leave; a block that shares a row never does
    const index_t at = row * columns;
    if (wide)
        forward_row<WIDE<real>>(x + at, weight, bias, out + at, mean + row, rstd + row, columns, epsilon, row_threads,
                                exchange);
    else
        forward_row<1>(x + at, weight, bias, out + at, mean + row, rstd + row, columns, epsilon, row_threads, exchange);
}

struct ResidualForwardParams {
    const real *residual, *branch, *weight, *bias;
    real *residual_out, *out;
    float *mean, *rstd;
    long long rows;
    int columns, row_threads, wide;
    float epsilon;
    Mask dropout;
};

template <int W>
__device__ __forceinline__ void residual_row(const ResidualForwardParams& params, index_t row, float* exchange) {
    const int row_threads = params.row_threads, thread = threadIdx.x % row_threads;
    const index_t at = row * params.columns;
    RowPart<W> part(thread, row_threads, params.columns);
    const auto add = [&](int column) {
        Pack<W> sum = load_pack<W>(params.branch + at + column);
        params.dropout.apply<W>(sum, at + column);
        const Pack<W> old = load_pack<W>(params.residual + at + column);
#pragma unroll
        for (int i = 0; i < W; i++) sum.v[i] = round_to_real(__fadd_rn(old.v[i], sum.v[i]));
        store_pack<W>(params.residual_out + at + column, sum);
        return sum;
    };
    part.fill(add);
    part.visit_rest([&](int column) { add(column); });
    const auto read = [&](int column) { return load_pack<W>(params.residual_out + at + column); };
    normalise<W>(part, read, params.weight, params.bias, params.out + at, params.mean + row, params.rstd + row,
                 params.epsilon, thread, row_threads, exchange);
}

// One block is asked for, or ptxas keeps to 64 registers on sm_80 and spills; not __grid_constant__: fewer registers.
extern "C" __global__ void __launch_bounds__(512, 1) ENTRY(residual_layernorm_forward)(
    const ResidualForwardParams params) {
    __shared__ float exchange[32];
    const int row_threads = params.row_threads;
    const index_t row = index_t(blockIdx.x) * (blockDim.x / row_threads) + threadIdx.x / row_threads;
    if (row >= params.rows) return;
    if (params.wide)
        residual_row<WIDE<real>>(params, row, exchange);
    else
        residual_row<1>(params, row, exchange);
}

// What one thread adds up over the rows of its chunk: dweight and dbias of its columns.
template <int W>
struct ColumnSums {
    static constexpr int PACKS = KEPT_PACKS<W>;
    Pack<W> weight[PACKS], bias[PACKS];
};

// One row of the backward, whose elements count from `at`; `sums` gets the row's part of dweight and dbias, beyond the
// kept columns `partial` does.
template <int W>
__device__ __forceinline__ void backward_row(const real* dout, const real* x, const real* weight, float mean,
                                             float rstd, const real* dresidual, real* dx, real* dbranch,
                                             const Mask& mask, index_t at, float* partial, index_t partial_stride,
                                             int columns, int row_threads, float* exchange, ColumnSums<W>& sums) {
    constexpr int PACKS = KEPT_PACKS<W>;
    const int thread = threadIdx.x % row_threads, first = thread * W, step = row_threads * W;
    Pack<W> gradients[PACKS], normalised[PACKS];  // g and x̂
    float g_sum = 0.0f, gx_sum = 0.0f;
    const auto read = [&](int column, Pack<W>& d, Pack<W>& n) {
        d = load_pack<W>(dout + column);
        n = load_pack<W>(x + column);
#pragma unroll
        for (int i = 0; i < W; i++) n.v[i] = (n.v[i] - mean) * rstd;
    };
    const auto weigh = [&](int column, Pack<W>& d, const Pack<W>& n) {
        const Pack<W> w = load_pack<W>(weight + column);
#pragma unroll
        for (int i = 0; i < W; i++) {
            d.v[i] *= w.v[i];
            g_sum += d.v[i];
            gx_sum += d.v[i] * n.v[i];
        }
    };
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int column = first + p * step;
        if (column >= columns) continue;
        read(column, gradients[p], normalised[p]);
#pragma unroll
        for (int i = 0; i < W; i++) {
            sums.weight[p].v[i] += gradients[p].v[i] * normalised[p].v[i];
            sums.bias[p].v[i] += gradients[p].v[i];
        }
        weigh(column, gradients[p], normalised[p]);
    }
    for (int column = first + PACKS * step; column < columns; column += step) {
        Pack<W> d, n;
        read(column, d, n);
        for (int i = 0; i < W; i++) {
            partial[column + i] += d.v[i] * n.v[i];
            partial[partial_stride + column + i] += d.v[i];
        }
        weigh(column, d, n);
    }
    const float g_mean = row_sum(g_sum, row_threads, exchange) / columns;
    const float gx_mean = row_sum(gx_sum, row_threads, exchange) / columns;
    const auto write = [&](int column, const Pack<W>& g, const Pack<W>& n) {
        Pack<W> y = {};
        if (dresidual != nullptr) y = load_pack<W>(dresidual + column);
#pragma unroll
        for (int i = 0; i < W; i++) y.v[i] += rstd * (g.v[i] - g_mean - n.v[i] * gx_mean);
        store_pack<W>(dx + column, y);
        if (dbranch == nullptr) return;
        mask.apply<W>(y, at + column);
        store_pack<W>(dbranch + column, y);
    };
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int column = first + p * step;
        if (column < columns) write(column, gradients[p], normalised[p]);
    }
    for (int column = first + PACKS * step; column < columns; column += step) {
        Pack<W> d, n, w = load_pack<W>(weight + column);
        read(column, d, n);
        for (int i = 0; i < W; i++) d.v[i] *= w.v[i];
        write(column, d, n);
    }
}

// Where element i of the pack p of a lane stands among the staged sums: lanes side by side, rows of 33 against
// conflicts.
template <int W>
__device__ __forceinline__ int staging_slot(int p, int i, int lane) {
    return (p * W + i) * 33 + lane;
}

struct BackwardParams {
    const real *dout, *x, *weight;
    const float *mean, *rstd;
    const real* dresidual;
    real *dx, *dbranch;
    float* partials;
    long long rows;
    int columns, chunk_rows, row_threads, wide;
    Mask dropout;
};

// The rows of one chunk, then the chunk's partial sums. `staging`: shared memory for two sums per column, of which 32·W
// take 33·W floats, when warps share the columns.
template <int W>
__device__ __forceinline__ void backward_chunk(const BackwardParams& params, float* exchange, float* staging) {
    constexpr int PACKS = KEPT_PACKS<W>;
    const int columns = params.columns, row_threads = params.row_threads;
    const int groups = blockDim.x / row_threads, group = threadIdx.x / row_threads;
    const int thread = threadIdx.x % row_threads, first = thread * W, step = row_threads * W;
    float* const partial = params.partials + index_t(blockIdx.x) * columns;
    const index_t stride = index_t(gridDim.x) * columns;  // from the partials of dweight to those of dbias
    ColumnSums<W> sums = {};
    for (int column = first + PACKS * step; column < columns; column += step)
        for (int i = 0; i < W; i++) partial[column + i] = partial[stride + column + i] = 0.0f;
    const index_t begin = index_t(blockIdx.x) * params.chunk_rows;
    const index_t end = begin + params.chunk_rows < params.rows ? begin + params.chunk_rows : params.rows;
    for (index_t row = begin + group; row < end; row += groups) {
        const index_t at = row * columns;
        backward_row<W>(params.dout + at, params.x + at, params.weight, params.mean[row], params.rstd[row],
                        params.dresidual == nullptr ? nullptr : params.dresidual + at, params.dx + at,
                        params.dbranch == nullptr ? nullptr : params.dbranch + at, params.dropout, at, partial, stride,
                        columns, row_threads, exchange, sums);
    }
    if (groups == 1) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int column = first + p * step;
            if (column >= columns) continue;
            store_floats<W>(partial + column, sums.weight[p]);
            store_floats<W>(partial + stride + column, sums.bias[p]);
        }
        return;
    }
    const int half = staging_slot<W>((columns - 1) / (32 * W) + 1, 0, 0);  // from the sums of dweight to those of dbias
    for (int turn = 0; turn < groups; turn++) {                            // the warps of the block add up in order
        if (turn == group) {
#pragma unroll
            for (int p = 0; p < PACKS; p++) {
                if (first + p * step >= columns) continue;
#pragma unroll
                for (int i = 0; i < W; i++) {
                    float* const slot = staging + staging_slot<W>(p, i, thread);
                    slot[0] = sums.weight[p].v[i] + (turn == 0 ? 0.0f : slot[0]);
                    slot[half] = sums.bias[p].v[i] + (turn == 0 ? 0.0f : slot[half]);
                }
            }
        }
        __syncthreads();
    }
    const int kept = columns < PACKS * step ? columns : PACKS * step;
    for (int column = threadIdx.x; column < kept; column += blockDim.x) {
        const float* const slot = staging + staging_slot<W>(column / (32 * W), column % W, column / W % 32);
        partial[column] = slot[0];
        partial[stride + column] = slot[half];
    }
}

extern "C" __global__ void __launch_bounds__(256) ENTRY(layernorm_backward)(
    const __grid_constant__ BackwardParams params) {
    __shared__ float exchange[32];
    extern __shared__ float staging[];
    if (params.wide)
        backward_chunk<WIDE<real>>(params, exchange, staging);
    else
        backward_chunk<1>(params, exchange, staging);
}
