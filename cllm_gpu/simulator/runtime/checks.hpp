// Hooks of the checker. In an unchecked build they are empty and cost nothing.
#pragma once
#include "runtime.hpp"

#ifdef SIM_CHECKED
#define SIM_HOOK(declaration) declaration;
#else
#define SIM_HOOK(declaration) \
    inline declaration {}
#endif

SIM_HOOK(void checks_begin_launch())
SIM_HOOK(void checks_end_launch())
SIM_HOOK(void checks_begin_block())
SIM_HOOK(void checks_end_block())
SIM_HOOK(void checks_reset_shared())
SIM_HOOK(void checks_thread_returned())
SIM_HOOK(void checks_block_barrier(sim::Site))
SIM_HOOK(void checks_shuffle_source(int, int, sim::Site))
SIM_HOOK(void checks_declare_shared(const void*, std::size_t, const char*))
/// All lanes of the running thread's warp have met at a __syncwarp.
SIM_HOOK(void checks_warp_barrier(unsigned, void* const*))
/// An access that the runtime makes for the running thread: address, bytes, write.
SIM_HOOK(void checks_access(const void*, int, bool, sim::Site))
SIM_HOOK(void checks_aligned(const void*, int, const char*, sim::Site))
SIM_HOOK(void checks_atomic(const void*, int, sim::Site))
/// A wait for a value that another block writes.
SIM_HOOK(void checks_wait(const void*, int, sim::Site))
SIM_HOOK(void checks_fence(int))
/// cp.async: shared, global, bytes, bytes read.
SIM_HOOK(void checks_copy_issued(const void*, const void*, int, int, sim::Site))
SIM_HOOK(void checks_copy_done(const void*, int, sim::Site, const void*))

#undef SIM_HOOK
