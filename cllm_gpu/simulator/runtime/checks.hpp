// Hooks of the checker. In an unchecked build they are empty and cost nothing.
#pragma once
#include "runtime.hpp"

#ifdef SIM_CHECKED
void checks_begin_launch();
void checks_end_launch();
void checks_begin_block();
void checks_thread_returned();
void checks_block_barrier(sim::Site site);
void checks_warp_barrier(unsigned lanes, void* const* payloads);
void checks_shuffle_source(int lane, int source, sim::Site site);
void checks_declare_shared(const void* address, std::size_t bytes, const char* name);
/// An access by the running thread made by the runtime for it (ldmatrix, cp.async).
void checks_access(const void* address, int bytes, bool write, sim::Site site);
#else
inline void checks_begin_launch() {}
inline void checks_end_launch() {}
inline void checks_begin_block() {}
inline void checks_thread_returned() {}
inline void checks_block_barrier(sim::Site) {}
inline void checks_warp_barrier(unsigned, void* const*) {}
inline void checks_shuffle_source(int, int, sim::Site) {}
inline void checks_declare_shared(const void*, std::size_t, const char*) {}
inline void checks_access(const void*, int, bool, sim::Site) {}
#endif
