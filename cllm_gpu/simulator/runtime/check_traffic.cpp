// Counts what a warp's accesses cost: bank conflicts in shared memory, 32-byte sectors in global memory.
//
// Lanes run one after the other here, so the accesses of one warp instruction are put together afterwards: the k-th
// time each lane passes the same place in the code between two barriers counts as one instruction.
#include <algorithm>
#include <unordered_map>
#include <vector>

#include "checks.hpp"
#include "shadow.hpp"

namespace sim {
namespace {

struct Record {
    std::uint32_t code, occurrence, thread;
    std::uintptr_t address;
    std::uint8_t warp, bytes;
    Space space;
};

std::vector<Record> records;
std::unordered_map<std::uint64_t, std::uint32_t> occurrences;  // of (code, thread) since the last flush
std::unordered_map<std::uint32_t, Traffic> totals;

/// Passes that `count` lanes at `first` need: the most different 4-byte words that fall into one of the 32 banks.
std::uint64_t bank_passes(const Record* first, std::size_t count) {
    std::uintptr_t words[32][64];
    int used[32] = {};
    int most = 0;
    for (std::size_t i = 0; i < count; ++i)
        for (std::uintptr_t word = first[i].address / 4; word <= (first[i].address + first[i].bytes - 1) / 4; ++word) {
            const int bank = word % 32;
            if (std::find(words[bank], words[bank] + used[bank], word) != words[bank] + used[bank]) continue;
            if (used[bank] < 64) words[bank][used[bank]++] = word;
            most = std::max(most, used[bank]);
        }
    return most;
}

/// Accesses of 8 bytes go by half warps, of 16 bytes by quarter warps.
void count_shared(Traffic& total, const Record* first, std::size_t count) {
    const std::size_t group = first->bytes >= 16 ? 8 : first->bytes >= 8 ? 16 : 32;
    for (std::size_t i = 0; i < count; i += group) {
        total.passes += bank_passes(first + i, std::min(group, count - i));
        total.ideal += 1;
    }
}

void count_global(Traffic& total, const Record* first, std::size_t count) {
    std::vector<std::uintptr_t> sectors;
    std::uint64_t bytes = 0;
    std::vector<std::uintptr_t> distinct;
    for (std::size_t i = 0; i < count; ++i) {
        for (std::uintptr_t s = first[i].address / 32; s <= (first[i].address + first[i].bytes - 1) / 32; ++s)
            sectors.push_back(s);
        distinct.push_back(first[i].address);
    }
    const auto unique = [](std::vector<std::uintptr_t>& v) {
        std::sort(v.begin(), v.end());
        return static_cast<std::uint64_t>(std::unique(v.begin(), v.end()) - v.begin());
    };
    bytes = unique(distinct) * first->bytes;
    total.passes += unique(sectors);
    total.ideal += (bytes + 31) / 32;
}

}  // namespace

void traffic_record(const Region& region, std::uintptr_t address, int bytes, const Code& code) {
    const std::uint32_t number = code_index(code);
    const std::uint64_t key = static_cast<std::uint64_t>(number) << 16 | current->number;
    const std::uintptr_t origin = region.space == Space::shared ? region.low : 0;  // a variable starts at bank 0
    const auto thread = static_cast<std::uint32_t>(current->number);
    records.push_back({number, occurrences[key]++, thread, address - origin,
                       static_cast<std::uint8_t>(current->warp()), static_cast<std::uint8_t>(bytes), region.space});
}

void traffic_flush() {
    const auto key = [](const Record& r) { return std::make_tuple(r.code, r.warp, r.occurrence); };
    // lanes in order, whatever turn they took: the hardware's quarter and half warps are made of neighbouring lanes
    std::sort(records.begin(), records.end(), [&](const Record& a, const Record& b) {
        return std::make_pair(key(a), a.thread) < std::make_pair(key(b), b.thread);
    });
    for (std::size_t i = 0, end; i < records.size(); i = end) {
        for (end = i; end < records.size() && key(records[end]) == key(records[i]);) ++end;
        Traffic& total = totals[records[i].code];
        total.shared = records[i].space == Space::shared;
        total.instructions += 1;
        (total.shared ? count_shared : count_global)(total, &records[i], end - i);
    }
    records.clear();
    occurrences.clear();
}

void traffic_begin() {
    records.clear();
    occurrences.clear();
    totals.clear();
}

void traffic_end() {
    launch->traffic_count = 0;
    for (auto& [number, total] : totals) {
        if (launch->traffic_count == launch->traffic_capacity) break;
        total.code = reinterpret_cast<std::uint64_t>(code_at(number).address);
        total.file = code_at(number).site.file;
        total.line = code_at(number).site.line;
        launch->traffic[launch->traffic_count++] = total;
    }
}

}  // namespace sim

void checks_end_block() { sim::traffic_flush(); }
void checks_end_launch() { sim::traffic_end(); }
