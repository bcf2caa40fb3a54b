// Barriers, votes and shuffles with CUDA's names.
#pragma once
#include "runtime_api.hpp"

__forceinline__ void __syncthreads(SIM_HERE) { sim_block_barrier(0, 0, SIM_SITE); }
__forceinline__ int __syncthreads_count(int predicate, SIM_HERE) { return sim_block_barrier(1, predicate, SIM_SITE); }
__forceinline__ int __syncthreads_and(int predicate, SIM_HERE) { return sim_block_barrier(2, predicate, SIM_SITE); }
__forceinline__ int __syncthreads_or(int predicate, SIM_HERE) { return sim_block_barrier(3, predicate, SIM_SITE); }
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu, SIM_HERE) { sim_warp_barrier(mask, SIM_SITE); }

__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate, SIM_HERE) {
    return sim_vote(0, mask, predicate != 0, SIM_SITE);
}
__forceinline__ int __any_sync(unsigned mask, int predicate, SIM_HERE) {
    return sim_vote(0, mask, predicate != 0, SIM_SITE) != 0;
}
__forceinline__ int __all_sync(unsigned mask, int predicate, SIM_HERE) {
    return sim_vote(0, mask, predicate == 0, SIM_SITE) == 0;
}
__forceinline__ unsigned __activemask(SIM_HERE) { return sim_active_mask(SIM_SITE); }

namespace sim {
template <class T>
__forceinline__ unsigned long long to_bits(T value) {
    static_assert(sizeof(T) <= 8, "shuffles move values of at most 8 bytes");
    unsigned long long bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T>
__forceinline__ T from_bits(unsigned long long bits) {
    T value;
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}
}  // namespace sim

template <class T>
__forceinline__ unsigned __match_any_sync(unsigned mask, T value, SIM_HERE) {
    return sim_vote(1, mask, sim::to_bits(value), SIM_SITE);
}
template <class T>
__forceinline__ unsigned __match_all_sync(unsigned mask, T value, int* predicate, SIM_HERE) {
    const unsigned lanes = sim_vote(2, mask, sim::to_bits(value), SIM_SITE);
    *predicate = lanes != 0;
    return lanes;
}

#define SIM_SHUFFLE(name, kind, operand_type)                                                                     \
    template <class T>                                                                                            \
    __forceinline__ T name(unsigned mask, T value, operand_type operand, int width = 32, SIM_HERE) {              \
        return sim::from_bits<T>(                                                                                 \
            sim_shuffle(kind, mask, sim::to_bits(value), static_cast<int>(operand), width, SIM_SITE));            \
    }
SIM_SHUFFLE(__shfl_sync, 0, int)
SIM_SHUFFLE(__shfl_up_sync, 1, unsigned)
SIM_SHUFFLE(__shfl_down_sync, 2, unsigned)
SIM_SHUFFLE(__shfl_xor_sync, 3, int)
#undef SIM_SHUFFLE

#define SIM_REDUCE(name, kind)                                                                                    \
    __forceinline__ unsigned name(unsigned mask, unsigned value, SIM_HERE) {                                      \
        return sim_warp_reduce(kind, 0, mask, value, SIM_SITE);                                                   \
    }                                                                                                             \
    __forceinline__ int name(unsigned mask, int value, SIM_HERE) {                                                \
        return static_cast<int>(sim_warp_reduce(kind, 1, mask, static_cast<unsigned>(value), SIM_SITE));          \
    }
SIM_REDUCE(__reduce_add_sync, 0)
SIM_REDUCE(__reduce_min_sync, 1)
SIM_REDUCE(__reduce_max_sync, 2)
SIM_REDUCE(__reduce_and_sync, 3)
SIM_REDUCE(__reduce_or_sync, 4)
SIM_REDUCE(__reduce_xor_sync, 5)
#undef SIM_REDUCE

__forceinline__ void __threadfence_block() { sim_memory_fence(0); }
__forceinline__ void __threadfence() { sim_memory_fence(1); }
__forceinline__ void __threadfence_system() { sim_memory_fence(2); }
__forceinline__ long long clock64() { return static_cast<long long>(sim_clock()); }
__forceinline__ void __nanosleep(unsigned) { sim_let_others_run(); }
__forceinline__ void __trap(SIM_HERE) { sim_trap("__trap() was called", SIM_SITE); }

#include "assert.h"
