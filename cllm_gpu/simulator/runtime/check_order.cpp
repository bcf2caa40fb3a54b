// Which accesses of earlier blocks the running thread may rely on: what fences and atomics hand from block to block.
//
// An atomic that follows a fence releases at its address: everything before the block barrier that precedes the fence,
// and what the fencing thread itself did before it. Where a barrier lies between, the fence may be another thread's. An
// atomic or a wait at the same address acquires what was released there, and what the releasing thread had acquired
// itself: for its own thread at once, for the rest of the block after a barrier (PTX ISA, memory consistency model:
// release and acquire patterns, causality order). A fence is not asked for on the acquiring side.
#include <algorithm>
#include <array>
#include <memory>
#include <unordered_map>
#include <vector>

#include "checks.hpp"
#include "shadow.hpp"

namespace sim {

Fences fences;

namespace {

/// How many fences each thread of a block has issued in one barrier interval.
using Counts = std::array<std::uint16_t, maximum_threads>;

/// What a block published by one atomic: its accesses before `interval`; within it those that a fence of their own
/// thread followed, of every thread where a barrier lies between (`all`), else of the releasing thread's warp
/// (`lanes`).
struct Release {
    std::uint32_t interval = 0;
    std::shared_ptr<const Counts> all;
    int warp = -1;
    std::array<std::uint16_t, 32> lanes{};
    std::uint16_t warp_syncs = 0;  // at the fence: what other lanes did before the last __syncwarp, too
};

/// For each earlier block, by the order in which they ran, the number of the latest release known; 0: none.
using Knowledge = std::vector<std::uint32_t>;

struct Acquired {
    std::shared_ptr<const Knowledge> what;
    std::uint32_t interval;
    int thread;
    std::uint16_t warp_syncs;
};

std::vector<Release> releases;
std::unordered_map<std::uintptr_t, std::shared_ptr<const Knowledge>> published;
Knowledge known;  // to every thread of the block
std::vector<Acquired> fresh;  // in the current interval
std::uint16_t syncs_at_fence[maximum_threads];
std::uint32_t interval_before;              // the last interval with a fence before that of `fences`,
std::shared_ptr<const Counts> counts_before;  // and its counts
std::uint32_t blocks_begun;

void merge(Knowledge& into, const Knowledge& other) {
    if (into.size() < other.size()) into.resize(other.size());
    for (std::size_t i = 0; i < other.size(); ++i)
        if (into[i] < other[i]) into[i] = other[i];
}

/// Acquisitions before the last barrier are known to the whole block.
void pass_barrier() {
    if (fresh.empty() || fresh.front().interval == block.interval) return;
    for (const Acquired& entry : fresh) merge(known, *entry.what);
    fresh.clear();
}

/// The fences counted are of an interval that a barrier has ended.
void close_interval() {
    interval_before = fences.interval;
    auto counts = std::make_shared<Counts>();
    std::copy(fences.counts, fences.counts + maximum_threads, counts->begin());
    counts_before = std::move(counts);
    fences = {};
}

bool usable(const Acquired& entry) {
    if (entry.thread == current->number) return true;
    return entry.thread / 32 == current->warp() && entry.warp_syncs != warp_syncs_of(current->warp());
}

bool covers(const Release& release, const Past& past) {
    if (past.interval != release.interval) return past.interval < release.interval;
    const auto count_of = [&](int thread) {
        if (release.all) return (*release.all)[thread];
        return thread / 32 == release.warp ? release.lanes[thread % 32] : std::uint16_t(0);
    };
    const bool others = past.many_warps || past.many_lanes;
    if (past.fences < count_of(past.thread) && (!others || count_of(past.other_thread))) return true;
    return past.thread / 32 == release.warp && !past.many_warps && past.warp_syncs != release.warp_syncs;
}

bool covered_by(const Knowledge& knowledge, const Past& past, std::size_t its_block) {
    return its_block < knowledge.size() && knowledge[its_block] && covers(releases[knowledge[its_block]], past);
}

/// The lane of the running thread's warp whose fence in this interval counts for its atomic: its own; -1: there is
/// none.
int fenced_lane() {
    if (fences.interval != block.interval) return -1;
    const int first = current->number / 32 * 32;
    if (fences.counts[current->number]) return current->lane();
    for (int lane = 0; lane < 32; ++lane)
        if (fences.counts[first + lane]) return lane;
    return -1;
}

/// False where no fence makes an atomic of the running thread a release.
bool describe_release(Release& release) {
    const int lane = fenced_lane(), first = current->number / 32 * 32;
    if (lane >= 0) {
        release.interval = block.interval;
        release.warp = current->warp();
        for (int i = 0; i < 32; ++i) release.lanes[i] = fences.counts[first + i];
        release.warp_syncs = syncs_at_fence[first + lane];
        return true;
    }
    if (fences.interval && fences.interval != block.interval) close_interval();
    release.interval = interval_before;
    release.all = counts_before;
    return interval_before != 0;
}

void publish(std::uintptr_t address, const Release& release) {
    releases.push_back(release);
    auto whole = std::make_shared<Knowledge>(known);
    for (const Acquired& entry : fresh)
        if (usable(entry)) merge(*whole, *entry.what);
    auto& place = published[address];
    if (place) merge(*whole, *place);
    whole->resize(blocks_begun);
    whole->back() = static_cast<std::uint32_t>(releases.size() - 1);
    place = std::move(whole);
}

}  // namespace

void order_begin_launch() {
    releases.assign(1, {});  // number 0 stands for none
    published.clear();
    blocks_begun = 0;
}

void order_begin_block() {
    ++blocks_begun;
    known.clear();
    fresh.clear();
    fences = {};
    interval_before = 0;
    counts_before = nullptr;
}

bool happened_before(const Past& past, std::size_t its_block) {
    pass_barrier();
    if (covered_by(known, past, its_block)) return true;
    for (const Acquired& entry : fresh)
        if (usable(entry) && covered_by(*entry.what, past, its_block)) return true;
    return false;
}

void acquire(const void* address) {
    pass_barrier();
    const auto found = published.find(reinterpret_cast<std::uintptr_t>(address));
    if (found == published.end()) return;
    fresh.push_back({found->second, block.interval, current->number, warp_syncs_of(current->warp())});
}

void release(const void* address) {
    pass_barrier();
    Release found;
    if (describe_release(found)) publish(reinterpret_cast<std::uintptr_t>(address), found);
}

}  // namespace sim

void checks_fence(int scope) {
    using namespace sim;
    if (scope == 0) return;
    const Busy busy(current->code);
    if (fences.interval && fences.interval != block.interval) close_interval();
    fences.interval = block.interval;
    ++fences.counts[current->number];
    syncs_at_fence[current->number] = warp_syncs_of(current->warp());
}
