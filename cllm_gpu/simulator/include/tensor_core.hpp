// What the wrappers of common.cuh stand on when there is no PTX: matrix loads, tensor-core products, asynchronous
// copies.
#pragma once
#include "runtime_api.hpp"

namespace sim {

/// ldmatrix of `count` 8x8 matrices; lane 8·j + r hands in the address of row r of matrix j.
template <int count, bool transposed>
__forceinline__ void load_matrix(unsigned* fragments, const void* row, SIM_HERE) {
    sim_load_matrix(row, fragments, count, transposed, SIM_SITE);
}

__forceinline__ void mma_bf16(float* d, const unsigned* a, const unsigned* b, const float* c, SIM_HERE) {
    sim_mma_m16n8k16_bf16(d, a, b, c, SIM_SITE);
}

template <int bytes>
__forceinline__ void copy_async(void* shared, const void* global, int source_bytes, SIM_HERE) {
    sim_copy_async(shared, global, bytes, source_bytes, SIM_SITE);
}

}  // namespace sim
