// Which accesses of earlier blocks the running thread may rely on: what fences and atomics hand from block to block.
//
// An atomic that follows a fence releases at its address: everything before the block barrier that precedes the fence,
// and what the fencing thread itself did before it. Where a barrier lies between, the fence may be another thread's. An
// atomic or a wait at the same address acquires what was released there, and what the releasing thread had acquired
// itself: for its own thread at once, for the rest of the block after a barrier (PTX ISA, memory consistency model:
// release and acquire patterns, causality order). A fence is not asked for on the acquiring side.
#include <bitset>
#include <memory>
#include <unordered_map>
#include <vector>

#include "checks.hpp"
#include "shadow.hpp"

namespace sim {
namespace {

/// Threads of a block that issued a fence in one barrier interval.
struct Fences {
    std::uint32_t interval = 0;  // 0: none
    std::bitset<maximum_threads> threads;
};

/// What a block published by one atomic: its accesses before `interval`, and those of `fences.threads` within it.
struct Release {
    Fences fences;
    int warp = -1;  // of the releasing thread: its lanes' accesses before the last __syncwarp, too
    std::uint16_t warp_syncs = 0;
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
Fences now, before;
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

bool usable(const Acquired& entry) {
    if (entry.thread == current->number) return true;
    return entry.thread / 32 == current->warp() && entry.warp_syncs != warp_syncs_of(current->warp());
}

bool covers(const Release& release, const Past& past) {
    const Fences& fences = release.fences;
    if (past.interval != fences.interval) return past.interval < fences.interval;
    const bool others = past.many_warps || past.many_lanes;
    if (fences.threads[past.thread] && (!others || fences.threads[past.other_thread])) return true;
    return past.thread / 32 == release.warp && !past.many_warps && past.warp_syncs != release.warp_syncs;
}

bool covered_by(const Knowledge& knowledge, const Past& past, std::size_t its_block) {
    return its_block < knowledge.size() && knowledge[its_block] && covers(releases[knowledge[its_block]], past);
}

/// The fence that makes an atomic of the running thread a release; null where there is none.
const Fences* fence_before_atomic() {
    if (now.interval != block.interval) return now.interval ? &now : nullptr;
    const std::size_t first = current->number / 32 * 32;
    for (std::size_t lane = first; lane < first + 32; ++lane)
        if (now.threads[lane]) return &now;
    return before.interval ? &before : nullptr;
}

void publish(std::uintptr_t address, const Fences& fences) {
    Release release{fences, -1, 0};
    if (fences.interval == block.interval) {  // the fences of other warps are not before this atomic
        release.fences.threads = {};
        const std::size_t first = current->number / 32 * 32;
        for (std::size_t lane = first; lane < first + 32; ++lane) release.fences.threads[lane] = fences.threads[lane];
        release.warp = current->warp();
        release.warp_syncs = warp_syncs_of(current->warp());
    }
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
    now = before = {};
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
    if (const Fences* fences = fence_before_atomic()) publish(reinterpret_cast<std::uintptr_t>(address), *fences);
}

}  // namespace sim

void checks_fence(int scope) {
    using namespace sim;
    if (scope == 0) return;
    if (now.interval != block.interval) before = now, now = {block.interval, {}};
    now.threads.set(static_cast<std::size_t>(current->number));
}
