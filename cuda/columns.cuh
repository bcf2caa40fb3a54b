// Sums over rows, column by column, in a fixed order: what bias gradients are made of.
//
// A block of 256 threads has 32 lanes × 8 warps: a lane holds W neighbouring columns, the warps take the rows of the
// block's chunk in turn. Partial sums go to partials (chunks, columns); column_sum_finish adds the chunks.
// Grid: x = ceil(columns / (32·W)) column tiles, y = chunks of chunk_rows rows.
#pragma once
#include "storage.cuh"

constexpr int COLUMN_WARPS = 8;

// Calls row_values(row, column) -> Pack<W> for every row and pack of this thread and writes the chunk's sums of them.
// staging: COLUMN_WARPS·32·W floats of shared memory.
template <int W, class Values>
__device__ __forceinline__ void column_partials(Values row_values, float* partials, index_t rows, int columns,
                                                int chunk_rows, float* staging) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = (blockIdx.x * 32 + lane) * W;
    const index_t begin = index_t(blockIdx.y) * chunk_rows;
    const index_t end = begin + chunk_rows < rows ? begin + chunk_rows : rows;
    Pack<W> sum = {};
    if (column < columns) {
        for (index_t row = begin + warp; row < end; row += COLUMN_WARPS) {
            const Pack<W> x = row_values(row, column);
#pragma unroll
            for (int i = 0; i < W; i++) sum.v[i] += x.v[i];
        }
    }
#pragma unroll
    for (int i = 0; i < W; i++) staging[(warp * W + i) * 32 + lane] = sum.v[i];
    __syncthreads();
    if (warp != 0 || column >= columns) return;
    Pack<W> total = {};
#pragma unroll
    for (int i = 0; i < W; i++)
        for (int w = 0; w < COLUMN_WARPS; w++) total.v[i] += staging[(w * W + i) * 32 + lane];
    store_floats<W>(partials + index_t(blockIdx.y) * columns + column, total);
}
