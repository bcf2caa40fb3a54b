// Regions of a launch: its global arrays, the static and dynamic shared memory of the running block.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <unordered_map>

#include "checks.hpp"
#include "shadow.hpp"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace sim {
namespace {

constexpr std::uintptr_t sparse_above = 64u << 20;

std::deque<Region> regions;  // addresses of elements stay valid
Region* last_found;
std::uintptr_t module_low, module_high;

std::vector<Code> codes(1);
std::unordered_map<std::uint64_t, std::uint32_t> code_numbers;

bool holds(const Region& region, std::uintptr_t address, int bytes) {
    return address >= region.low && address + bytes <= region.high;
}

void add_region(std::uintptr_t low, std::uintptr_t high, const char* name, Space space, int shift) {
    regions.emplace_back();
    Region& region = regions.back();
    region.low = low, region.high = high, region.name = name, region.space = space, region.shift = shift;
    if (high - low <= sparse_above) region.cells.resize(((high - low) >> shift) + 1);
    if (space == Space::shared) region.written.resize(high - low + 1);
}

#if defined(__linux__)
int note_module(dl_phdr_info* info, std::size_t, void*) {
    const auto self = reinterpret_cast<std::uintptr_t>(&module_low);
    for (int pass = 0; pass < 2; ++pass)
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            const std::uintptr_t low = info->dlpi_addr + header.p_vaddr, high = low + header.p_memsz;
            if (header.p_type != PT_LOAD) continue;
            if (pass == 0 && self >= low && self < high) module_low = low, module_high = high;
            if (pass == 1 && module_high)
                module_low = std::min(module_low, low), module_high = std::max(module_high, high);
        }
    return module_high != 0;
}
#else
int note_module(void*, std::size_t, void*) { return 0; }
#endif

/// "3 bytes past the end of x (400 bytes)", for the region nearest to the address.
void describe_address(char* text, std::size_t room, std::uintptr_t address, int bytes) {
    const Region* nearest = nullptr;
    std::uint64_t best = 1 << 20;
    for (const Region& region : regions) {
        const std::uint64_t distance = address < region.low ? region.low - address
                                       : address + bytes > region.high ? address + bytes - region.high : 0;
        if (distance <= best) best = distance, nearest = &region;
    }
    if (nearest == nullptr) {
        std::snprintf(text, room, "at %p, which lies in no argument and no shared variable",
                      reinterpret_cast<void*>(address));
        return;
    }
    std::snprintf(text, room, "at byte %lld of %s, which has %llu bytes",
                  static_cast<long long>(address) - static_cast<long long>(nearest->low), nearest->name,
                  static_cast<unsigned long long>(nearest->high - nearest->low));
}

bool in_stacks(std::uintptr_t address, bool own) {
    const auto base = reinterpret_cast<std::uintptr_t>(launch->stacks);
    const int number = current->number;
    const std::uintptr_t low = own ? base + number * launch->stack_bytes : base;
    return address >= low && address < (own ? low + launch->stack_bytes : base + maximum_threads * launch->stack_bytes);
}

}  // namespace

Region* find_region(std::uintptr_t address, int bytes, bool write, const Code& code) {
    if (in_stacks(address, true)) return nullptr;
    if (last_found != nullptr && holds(*last_found, address, bytes)) return last_found;
    for (Region& region : regions)
        if (holds(region, address, bytes)) return last_found = &region;
    const auto dynamic = reinterpret_cast<std::uintptr_t>(sim_dynamic_shared);
    const bool in_dynamic = address >= dynamic && address < dynamic + maximum_shared;
    const bool near_shared = std::any_of(regions.begin(), regions.end(), [&](const Region& region) {
        return region.space == Space::shared && address + bytes + zone_bytes > region.low &&
               address < region.high + zone_bytes;
    });
    if (!in_dynamic && !near_shared && address >= module_low && address < module_high) return nullptr;
    char text[400], where[300];
    describe_address(where, sizeof where, address, bytes);
    if (in_stacks(address, false)) std::snprintf(where, sizeof where, "in another thread's local memory");
    std::snprintf(text, sizeof text, "%s %d byte%s %s", write ? "writes" : "reads", bytes, bytes == 1 ? "" : "s",
                  where);
    fault_in("out of range", code, text);
}

void fault_in(const char* kind, const Code& code, const char* text) {
    if (code.address) current->code = code.address;
    fault(kind, code.site, "%s", text);
}

std::uint32_t code_index(const Code& code) {
    const std::uint64_t key = code.address
                                  ? reinterpret_cast<std::uint64_t>(code.address)
                                  : reinterpret_cast<std::uint64_t>(code.site.file) * 1000003u + code.site.line;
    auto [entry, is_new] = code_numbers.try_emplace(key, static_cast<std::uint32_t>(codes.size()));
    if (is_new) codes.push_back(code);
    return entry->second;
}

const Code& code_at(std::uint32_t index) { return codes[index]; }

}  // namespace sim

using namespace sim;

void checks_begin_launch() {
    races_begin();
    traffic_begin();
    regions.clear();
    last_found = nullptr;
    if (!module_high) {
#if defined(__linux__)
        dl_iterate_phdr(note_module, nullptr);
#endif
    }
    for (std::int64_t i = 0; i < launch->range_count; ++i) {
        const Range& range = launch->ranges[i];
        const int shift = range.item_bytes % 4 == 0 ? 2 : range.item_bytes % 2 == 0 ? 1 : 0;
        add_region(range.low, range.high, range.name, Space::global, shift);
    }
    const auto dynamic = reinterpret_cast<std::uintptr_t>(sim_dynamic_shared);
    add_region(dynamic, dynamic + launch->shared_bytes, "dynamic shared memory", Space::shared, 1);
}

void checks_declare_shared(const void* address, std::size_t bytes, const char* name) {
    const Busy busy(current->code);
    const auto low = reinterpret_cast<std::uintptr_t>(address);
    for (Region& region : regions)
        if (region.low == low && region.space == Space::shared && region.high == low + bytes) {
            std::fill(region.written.begin(), region.written.end(), 0);
            return;
        }
    add_region(low, low + bytes, name, Space::shared, 1);
}

void checks_reset_shared() {
    for (Region& region : regions) std::fill(region.written.begin(), region.written.end(), 0);
}
