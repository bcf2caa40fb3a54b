// Column sums (bias gradients) and the bias addition of a linear map.
//
//   column_sum_partial   partials[c] = Σ_{rows of chunk c} x           x (N, M) real, partials (chunks, M) fp32
//   column_sum_finish    out (+)= Σ_c partials[c]                      out (M) gradient; also ends other kernels' sums
//   bias_add             x += bias                                     x (N, M) real, bias (M) real
//
// Work: see columns.cuh; finish: a block of 32 columns × 8 warps, each warp adding every eighth chunk, then the warps
//   in order. Traffic: partial 1 read per element; bias_add 1 read and 1 write; finish reads the partials.
// Deterministic: one order, fixed by the shape. Source: two-pass reduction, Harris 2007, "Optimizing parallel
//   reduction".
#include "columns.cuh"

extern "C" __global__ void __launch_bounds__(256) ENTRY(column_sum_partial)(
    const real* x, float* partials, long long rows, int columns, int chunk_rows, int wide) {
    __shared__ float staging[COLUMN_WARPS * 32 * WIDE<real>];
    if (wide)
        column_partials<WIDE<real>>(
            [&](index_t row, int column) { return load_pack<WIDE<real>>(x + row * columns + column); }, partials, rows,
            columns, chunk_rows, staging);
    else
        column_partials<1>([&](index_t row, int column) { return load_pack<1>(x + row * columns + column); }, partials,
                           rows, columns, chunk_rows, staging);
}

extern "C" __global__ void __launch_bounds__(256) ENTRY(column_sum_finish)(
    const float* partials, gradient* out, int chunks, int columns, int accumulate) {
    __shared__ float staging[COLUMN_WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (column < columns)
        for (int chunk = warp; chunk < chunks; chunk += COLUMN_WARPS)
            sum += partials[index_t(chunk) * columns + column];
    staging[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= columns) return;
    float total = accumulate ? to_float(out[column]) : 0.0f;
    for (int w = 0; w < COLUMN_WARPS; w++) total += staging[w][lane];
    store(out + column, total);
}

template <int W>
__device__ __forceinline__ void add_bias(real* x, const real* bias, index_t rows, int columns, int chunk_rows) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = (blockIdx.x * 32 + lane) * W;
    if (column >= columns) return;
    const Pack<W> b = load_pack<W>(bias + column);
    const index_t begin = index_t(blockIdx.y) * chunk_rows;
    const index_t end = begin + chunk_rows < rows ? begin + chunk_rows : rows;
    for (index_t row = begin + warp; row < end; row += COLUMN_WARPS) {
        Pack<W> y = load_pack<W>(x + row * columns + column);
#pragma unroll
        for (int i = 0; i < W; i++) y.v[i] += b.v[i];
        store_pack<W>(x + row * columns + column, y);
    }
}

extern "C" __global__ void __launch_bounds__(256) ENTRY(bias_add)(
    real* x, const real* bias, long long rows, int columns, int chunk_rows, int wide) {
    if (wide)
        add_bias<WIDE<real>>(x, bias, rows, columns, chunk_rows);
    else
        add_bias<1>(x, bias, rows, columns, chunk_rows);
}
