// Who touched what: reads of never-written shared memory, data races within a block and between blocks, accesses to
// memory that an asynchronous copy is still filling.
//
// Two accesses of one block are ordered by a block barrier between them; two of one warp also by a __syncwarp. Votes,
// shuffles and matrix instructions order nothing (CUDA programming guide: they "do not imply a memory barrier"). Two
// accesses of different blocks are ordered only by a fence and an atomic after the first and an atomic at the same
// address before the second: check_order.cpp.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "checks.hpp"
#include "shadow.hpp"

namespace sim {
namespace {

std::uint16_t warp_syncs[maximum_warps];

std::vector<std::uint32_t> first_intervals;  // of each block of the launch, in the order in which they ran

/// The earlier access certainly happened before what the running thread does now.
bool ordered(const Past& past) {
    if (past.interval == block.interval) {
        if (past.many_warps) return false;
        if (past.thread == current->number && !past.many_lanes) return true;
        return past.thread / 32 == current->warp() && past.warp_syncs != warp_syncs[current->warp()];
    }
    if (past.interval >= first_intervals.back()) return true;
    const auto after = std::upper_bound(first_intervals.begin(), first_intervals.end(), past.interval);
    return happened_before(past, static_cast<std::size_t>(after - first_intervals.begin()) - 1);
}

[[noreturn]] void report_race(const Region& region, std::uintptr_t address, bool write, const Past& past,
                              bool past_write, const Code& code) {
    char text[500];
    const bool other_block = past.interval < first_intervals.back();
    const unsigned* size = launch->block;
    const bool same_thread = !other_block && past.thread == current->number;
    const unsigned t = same_thread ? past.other_thread : past.thread;
    std::snprintf(text, sizeof text,
                  "%s byte %llu of %s, which thread (%u, %u, %u) of %s block %s%s, with nothing between",
                  write ? "writes" : "reads", static_cast<unsigned long long>(address - region.low), region.name,
                  t % size[0], t / size[0] % size[1], t / (size[0] * size[1]), other_block ? "an earlier" : "the same",
                  past_write ? "wrote" : "read", past.atomic ? " by an atomic" : "");
    const Code& other = code_at(past.code);
    launch->other_address_in_code = reinterpret_cast<std::uint64_t>(other.address);
    launch->other_line = other.site.line;
    fault_in("race", code, text);
}

Past remember(const Past& before, std::uint8_t bytes, bool atomic, std::uint32_t code) {
    Past now;
    now.interval = block.interval;
    now.thread = static_cast<std::uint16_t>(current->number);
    now.warp_syncs = warp_syncs[current->warp()];
    now.bytes = bytes, now.atomic = atomic, now.code = code;
    now.fences = fences.of(current->number);
    if (before.interval == now.interval && before.thread != now.thread) {
        now.other_thread = before.thread;
        now.many_warps = before.many_warps || before.thread / 32 != now.thread / 32;
        now.many_lanes = before.warp_syncs == now.warp_syncs;
    } else if (before.interval == now.interval) {
        now.other_thread = before.other_thread;
        now.many_warps = before.many_warps;
        now.many_lanes = before.many_lanes && before.warp_syncs == now.warp_syncs;
    }
    return now;
}

void check_cell(Region& region, std::size_t index, std::uint8_t bytes, bool write, bool atomic, const Code& code,
                std::uint32_t number, std::uintptr_t address) {
    Cell& cell = region.cell(index);
    if (region.space == Space::shared && cell.write.interval < first_intervals.back()) cell.write = Past{};
    if (region.space == Space::shared && cell.read.interval < first_intervals.back()) cell.read = Past{};
    const bool both_atomic = atomic && cell.write.atomic;
    if (cell.write.interval && (cell.write.bytes & bytes) && !both_atomic && !ordered(cell.write))
        report_race(region, address, write, cell.write, true, code);
    if (write && cell.read.interval && (cell.read.bytes & bytes) && !ordered(cell.read))
        report_race(region, address, write, cell.read, false, code);
    if (write) {
        cell.write = remember(atomic ? cell.write : Past{}, bytes, atomic, number);
        if (!atomic) cell.read = Past{};
    } else {
        cell.read = remember(cell.read, bytes | cell.read.bytes, false, number);
    }
}

void check_written(Region& region, std::size_t offset, int bytes, bool write, const Code& code) {
    char text[300];
    for (int i = 0; i < bytes; ++i) {
        std::uint8_t& state = region.written[offset + i];
        if (state == 2) {
            std::snprintf(text, sizeof text,
                          "%s byte %zu of %s while an asynchronous copy into it has not been waited for",
                          write ? "writes" : "reads", offset + i, region.name);
            fault_in("asynchronous copy", code, text);
        }
        if (!write && state == 0) {
            std::snprintf(text, sizeof text, "reads byte %zu of %s, which nothing has written in this block",
                          offset + i, region.name);
            fault_in("uninitialised", code, text);
        }
        if (write) state = 1;
    }
}

}  // namespace

void check_access(std::uintptr_t address, int bytes, bool write, bool atomic, const Code& code) {
    const Busy busy(code.address ? code.address : current->code);
    Region* region = find_region(address, bytes, write, code);
    if (region == nullptr || bytes == 0) return;
    const std::size_t offset = address - region->low;
    if (region->space == Space::shared) {
        if (atomic) check_written(*region, offset, bytes, false, code);
        check_written(*region, offset, bytes, write, code);
    }
    if (launch->count_traffic && !atomic) traffic_record(*region, address, bytes, code);
    const std::uint32_t number = code_index(code);
    const int granule = 1 << region->shift;
    for (std::size_t done = 0; done < static_cast<std::size_t>(bytes);) {
        const std::size_t index = (offset + done) >> region->shift, within = (offset + done) & (granule - 1);
        const std::size_t count = std::min<std::size_t>(granule - within, bytes - done);
        const auto mask = static_cast<std::uint8_t>(((1u << count) - 1) << within);
        check_cell(*region, index, mask, write, atomic, code, number, address + done);
        done += count;
    }
}

std::uint16_t warp_syncs_of(int warp) { return warp_syncs[warp]; }

void races_begin() {
    first_intervals.clear();
    order_begin_launch();
}

/// Marks the bytes as being filled by a copy (`pending`) or as filled by it.
void set_pending(const void* shared, int bytes, bool pending) {
    Region* region = find_region(reinterpret_cast<std::uintptr_t>(shared), bytes, true, Code{});
    if (region == nullptr || region->space != Space::shared) return;
    const std::size_t offset = reinterpret_cast<std::uintptr_t>(shared) - region->low;
    for (int i = 0; i < bytes; ++i) region->written[offset + i] = pending ? 2 : 1;
}

}  // namespace sim

using namespace sim;

void checks_begin_block() {
    first_intervals.push_back(block.interval);
    order_begin_block();
    for (auto& syncs : warp_syncs) ++syncs;
    checks_reset_shared();
}

void checks_warp_barrier(unsigned, void* const*) { ++warp_syncs[current->warp()]; }

void checks_access(const void* address, int bytes, bool write, Site site) {
    check_access(reinterpret_cast<std::uintptr_t>(address), bytes, write, false, Code{current->code, site});
}

void checks_atomic(const void* address, int bytes, Site site) {
    const Busy busy(current->code);
    check_access(reinterpret_cast<std::uintptr_t>(address), bytes, true, true, Code{current->code, site});
    acquire(address);
    release(address);
}

void checks_wait(const void* address, int bytes, Site site) {
    const Busy busy(current->code);
    check_access(reinterpret_cast<std::uintptr_t>(address), bytes, true, true, Code{current->code, site});
    acquire(address);
}

void checks_copy_issued(const void* shared, const void* global, int bytes, int source_bytes, Site site) {
    checks_aligned(shared, bytes, "the shared address of an asynchronous copy", site);
    checks_aligned(global, source_bytes ? bytes : 1, "the global address of an asynchronous copy", site);
    if (source_bytes) checks_access(global, source_bytes, false, site);
    checks_access(shared, bytes, true, site);
    set_pending(shared, bytes, true);
}

void checks_copy_done(const void* shared, int bytes, Site site, const void* code) {
    set_pending(shared, bytes, false);
    check_access(reinterpret_cast<std::uintptr_t>(shared), bytes, true, false, Code{code, site});
}

void checks_aligned(const void* address, int alignment, const char* what, Site site) {
    if (reinterpret_cast<std::uintptr_t>(address) % alignment)
        fault("misaligned", site, "%s is not a multiple of %d", what, alignment);
}

void checks_block_barrier(Site site) {
    const Busy busy(current->code);
    if (block.arrived == block.alive && launch->count_traffic) traffic_flush();
    const Thread* other = nullptr;
    if (block.alive < block.threads)
        fault("divergence", site, "waits at the block's barrier, but %d threads of the block have returned",
              block.threads - block.alive);
    for (int i = 0; i < block.threads && other == nullptr; ++i)
        if (&threads[i] != current && threads[i].state == State::block_wait) other = &threads[i];
    if (other != nullptr && (other->site.line != site.line))
        fault("divergence", site, "waits at the block's barrier in line %d while thread %d waits at another in line %d",
              site.line, other->number, other->site.line);
}

void checks_thread_returned() {
    if (!block.arrived) return;
    const Thread* waiting = nullptr;
    for (int i = 0; i < block.threads && waiting == nullptr; ++i)
        if (threads[i].state == State::block_wait) waiting = &threads[i];
    fault("divergence", waiting->site, "returns while %d threads of the block wait at the barrier in line %d",
          block.arrived, waiting->site.line);
}

void checks_shuffle_source(int lane, int source, Site site) {
    fault("warp mask", site, "lane %d reads from lane %d, which does not take part in the shuffle", lane, source);
}
