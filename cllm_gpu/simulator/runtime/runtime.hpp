// The state of a running launch: one block at a time, its warps and its threads.
#pragma once
#include <csignal>
#include <cstddef>
#include <cstdint>

#include "../include/runtime_api.hpp"
#include "../include/vector_types.hpp"
#include "../include/kernel_table.hpp"
#include "fiber.hpp"

namespace sim {

constexpr int maximum_threads = 1024;
constexpr int maximum_warps = 32;
constexpr std::size_t maximum_shared = 227 * 1024;

/// A global array of the launch, by its first and one-past-last byte.
struct Range {
    std::uintptr_t low, high;
    const char* name;
    int item_bytes;
};

/// What one place in the code asked of memory.
struct Traffic {
    std::uint64_t code;  // address of the access, 0 where file and line are known
    const char* file;
    std::int32_t line, shared;
    std::uint64_t instructions;  // of a warp
    std::uint64_t passes;        // shared: passes over the banks; global: 32-byte sectors
    std::uint64_t ideal;         // the fewest that so many bytes can need
};

/// Filled in by Python (ctypes, launch.py); the two must agree field by field.
struct Launch {
    const Kernel* kernel;
    void** arguments;
    unsigned grid[3];
    unsigned block[3];
    std::uint64_t shared_bytes;   // dynamic
    std::uint64_t static_limit;
    std::uint64_t seed;           // 0: warps and lanes in order
    std::int32_t lazy_copies;     // cp.async copies at the wait rather than at the issue
    std::int32_t count_traffic;   // count bank conflicts and sectors (checked builds only)
    unsigned char* stacks;
    std::uint64_t stack_bytes;    // of one thread, its guard page included
    const Range* ranges;
    std::int64_t range_count;
    Traffic* traffic;
    std::int64_t traffic_capacity, traffic_count;
    // Results.
    std::uint64_t static_shared;  // bytes of static shared memory the kernel declared
    unsigned fault_block[3];
    unsigned fault_thread[3];
    std::uint64_t fault_address_in_code;  // return address of the faulting access, 0 where the site is known
    std::uint64_t other_address_in_code;  // of the earlier access in a race
    std::int32_t fault_line;
    std::int32_t other_line;
    char fault_kind[32];
    char fault_file[512];
    char fault_message[1024];
};

enum class State : std::uint8_t { ready, warp_wait, block_wait, exited };
enum class Operation : std::uint8_t { none, barrier, shuffle, vote, reduce, active_mask, load_matrix, mma };

struct Thread {
    Fiber fiber;
    State state;
    Operation operation;
    unsigned mask;
    void* payload;
    Site site;
    const void* code;  // the place in the kernel that called the runtime last
    uint3 index;
    int number;  // within the block
    int lane() const { return number & 31; }
    int warp() const { return number >> 5; }
};

struct Warp {
    unsigned alive;    // lanes that exist and have not returned
    unsigned ready;    // lanes that can run
    unsigned waiting;  // lanes at a warp operation
    Thread* lanes;
};

struct Block {
    int threads, warps, alive, arrived;
    unsigned ready_warps;
    int count, result;  // threads with a true predicate, at this barrier and at the last one
    std::uint32_t interval;  // counts barriers over the whole launch
};

extern Launch* launch;
extern Block block;
extern Warp warps[maximum_warps];
extern Thread threads[maximum_threads];
extern Thread* current;

/// First line of every call from a kernel: notes where it came from, for the chain of inlined functions in a report.
#ifdef SIM_CHECKED
#define SIM_ENTER sim::current->code = __builtin_return_address(0)
#else
#define SIM_ENTER static_cast<void>(0)
#endif

/// Called by the last lane for all lanes of `lanes`; payloads[lane] is what each lane handed in.
using Compute = void (*)(unsigned lanes, void* const* payloads);
void collective(Operation operation, unsigned mask, Compute compute, void* payload, Site site);

/// Gives the next thread that can run a turn; the running one goes on later.
void let_others_run();
/// A volatile read by the running thread, which may be waiting for another one to write: others run now and then.
void volatile_read(const void* code);

/// The runtime changes its own records: the launch can be paused afterwards only.
extern volatile std::sig_atomic_t runtime_busy;
/// A pause was asked for while it was not possible.
extern volatile std::sig_atomic_t pause_wanted;
/// The place in the kernel of its last access or other call that can tell it.
extern const void* last_call;
/// Leaves the launch, on the running thread's stack, until sim_continue; `code` is where the kernel stands.
void pause_launch(const void* code);

/// Keeps the runtime busy while it lives, and makes up for a pause that was asked for meanwhile.
class Busy {
public:
    explicit Busy(const void* code) : code_(code), before_(runtime_busy) {
        runtime_busy = 1;
        last_call = code;
    }
    ~Busy() {
        runtime_busy = before_;
        if (pause_wanted && !before_) pause_launch(code_);
    }
    Busy(const Busy&) = delete;
    Busy& operator=(const Busy&) = delete;

private:
    const void* code_;
    std::sig_atomic_t before_;
};

/// Ends the launch with a finding. The text says what is wrong; where it is, the fields say.
[[noreturn]] void fault(const char* kind, Site site, const char* format, ...) __attribute__((format(printf, 3, 4)));
/// The same without ending it.
void record_fault(const char* kind, Site site, const char* format, ...) __attribute__((format(printf, 3, 4)));
[[noreturn]] void leave_launch();

std::uint32_t random_bits();
int pick_bit(unsigned mask);

}  // namespace sim
