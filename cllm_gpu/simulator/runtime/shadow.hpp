// What the checker knows about memory: regions that a kernel may touch, and who touched each part of them last.
#pragma once
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "runtime.hpp"

namespace sim {

/// Where in the code an access stands: an address in the compiled kernel, or a site the compiler filled in.
struct Code {
    const void* address = nullptr;
    Site site{nullptr, 0};
};

/// One past access: in which barrier interval, by which thread, after how many __syncwarp of its warp.
struct Past {
    std::uint32_t interval = 0;  // 0: none
    std::uint16_t thread = 0;
    std::uint16_t warp_syncs = 0;
    std::uint16_t other_thread = 0;  // where many took part: one that is not `thread`
    std::uint8_t bytes = 0;      // which bytes of the granule
    std::uint8_t atomic = 0;
    std::uint8_t many_lanes = 0;  // further lanes of the same warp took part
    std::uint8_t many_warps = 0;
    std::uint16_t fences = 0;     // how many the thread had issued in the interval
    std::uint32_t code = 0;      // index into `codes`
};

struct Cell {
    Past write, read;
};

enum class Space : std::uint8_t { global, shared };

struct Region {
    std::uintptr_t low = 0, high = 0;
    const char* name = "";
    Space space = Space::global;
    int shift = 1;                      // log2 of the granule's bytes
    std::uint32_t serial = 0;           // shared: the block for which it was last reset
    std::vector<Cell> cells;                           // one per granule,
    std::unordered_map<std::size_t, Cell> sparse_cells;  // or, in a large region, one per granule touched
    Cell& cell(std::size_t index) { return cells.empty() ? sparse_cells[index] : cells[index]; }
    std::vector<std::uint8_t> written;  // shared: 0 never written, 1 written, 2 an asynchronous copy is under way
};

/// The region an access of the running thread falls into; null for the thread's own stack and the module's own data.
/// An access outside everything ends the launch.
Region* find_region(std::uintptr_t address, int bytes, bool write, const Code& code);

/// Checks one access and remembers it.
void check_access(std::uintptr_t address, int bytes, bool write, bool atomic, const Code& code);

[[noreturn]] void fault_in(const char* kind, const Code& code, const char* text);

/// Bank conflicts and global-memory sectors, counted where the launch asks for it.
void traffic_record(const Region& region, std::uintptr_t address, int bytes, const Code& code);
void traffic_flush();
void traffic_begin();
void races_begin();

/// How many fences each thread of the block has issued in one barrier interval, the last one with any; 0: none yet.
struct Fences {
    std::uint32_t interval = 0;
    std::uint16_t counts[maximum_threads] = {};
    std::uint16_t of(int thread) const { return interval == block.interval ? counts[thread] : 0; }
};
extern Fences fences;

/// Order between blocks, by fences and atomics.
void order_begin_launch();
void order_begin_block();
void acquire(const void* address);
void release(const void* address);
/// An access of the block that ran as number `its_block` certainly happened before what the running thread does now.
bool happened_before(const Past& past, std::size_t its_block);
/// How often the lanes of the warp have met at a __syncwarp.
std::uint16_t warp_syncs_of(int warp);

std::uint32_t code_index(const Code& code);
const Code& code_at(std::uint32_t index);

}  // namespace sim
