// The calls from a simulated kernel into the runtime. All of them are plain C linkage, so that the kernel's translation
// unit may be compiled with other flags (instrumentation) than the runtime's.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sim {

/// Where in the CUDA source an operation stands; filled in by the compiler through default arguments.
struct Site {
    const char* file;
    int line;
};

#ifdef SIM_CHECKED
constexpr std::size_t zone_bytes = 512;
#else
constexpr std::size_t zone_bytes = 16;
#endif

/// A shared variable with room before and after it, so that a step past its end is seen. It stands at an address that
/// is a multiple of its type's alignment and of no more, as CUDA guarantees no more.
template <class T>
struct alignas(alignof(T) > 128 ? alignof(T) : 128) Guarded {
    unsigned char before[zone_bytes];
#ifdef SIM_CHECKED
    unsigned char odd[alignof(T)];
#endif
    T value;
    unsigned char after[zone_bytes];
};

}  // namespace sim

#define SIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIM_SITE (sim::Site{file, line})

extern "C" {
// Barriers of the block: kind 0 plain, 1 count, 2 and, 3 or.
int sim_block_barrier(int kind, int predicate, sim::Site site);
void sim_warp_barrier(unsigned mask, sim::Site site);
// kind: 0 index, 1 up, 2 down, 3 xor. Returns the bits of the source lane's value.
unsigned long long sim_shuffle(int kind, unsigned mask, unsigned long long bits, int operand, int width,
                               sim::Site site);
// kind: 0 ballot, 1 match any, 2 match all. Returns the mask of lanes.
unsigned sim_vote(int kind, unsigned mask, unsigned long long value, sim::Site site);
// kind: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor; min and max on signed values where `is_signed`.
unsigned sim_warp_reduce(int kind, int is_signed, unsigned mask, unsigned value, sim::Site site);
unsigned sim_active_mask(sim::Site site);
void sim_memory_fence(int scope);
unsigned long long sim_clock();
void sim_let_others_run();
[[noreturn]] void sim_trap(const char* what, sim::Site site);

// Shared memory.
extern unsigned char* const sim_dynamic_shared;
extern unsigned sim_block_serial;
void sim_declare_shared(const void* address, std::size_t bytes, const char* name, sim::Site site);

// Asynchronous copies from global to shared memory (PTX cp.async).
void sim_copy_async(void* shared, const void* global, int bytes, int source_bytes, sim::Site site);
void sim_copy_commit();
void sim_copy_wait(int pending_groups);

// Tensor cores.
void sim_load_matrix(const void* shared_row, unsigned* fragments, int count, int transposed, sim::Site site);
void sim_mma_m16n8k16_bf16(float* d, const unsigned* a, const unsigned* b, const float* c, sim::Site site);

// An atomic access is about to happen at this address (checks, ordering).
void sim_atomic_access(const void* address, int bytes, sim::Site site);
// Waits until an earlier block has written `value` there. Blocks run one after another: what is not there now will
// never be, and ends the launch.
void sim_wait_for(const unsigned* address, unsigned value, sim::Site site);
}

namespace sim {
inline __attribute__((always_inline)) void declare_shared(unsigned& seen, const volatile void* address,
                                                          std::size_t bytes, const char* name, SIM_HERE) {
    if (seen != sim_block_serial) {
        seen = sim_block_serial;
        sim_declare_shared(const_cast<const void*>(address), bytes, name, SIM_SITE);
    }
}
}  // namespace sim
