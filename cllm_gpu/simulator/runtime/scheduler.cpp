// Runs the blocks of a launch one after the other; the threads of a block are fibers that switch at barriers and at
// warp operations only.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "checks.hpp"
#include "copies.hpp"
#include "crash.hpp"
#include "runtime.hpp"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
unsigned sim_block_serial = 0;
static_assert(sizeof(sim::Range) == 32);

namespace sim {

Launch* launch;
Block block;
Warp warps[maximum_warps];
Thread threads[maximum_threads];
Thread* current;
volatile std::sig_atomic_t runtime_busy, pause_wanted;
const void* last_call;

namespace {
Fiber host;
Fiber paused;            // the simulated thread that a pause interrupted
bool is_paused;          // within a block
const void* paused_code;  // where the kernel stood
std::uint64_t random_state;

alignas(1024) unsigned char dynamic_shared[maximum_shared + 1024];

void run_thread();

void resume(Thread* next) {
    Thread* previous = current;
    if (previous == next) return;
    current = next;
    threadIdx = next->index;
    fiber_switch(previous->fiber, next->fiber);
}

/// "12 threads wait at file:line" for each place where threads of the block wait.
void describe_waiting(char* text, std::size_t room) {
    std::size_t used = 0;
    bool told[maximum_threads] = {};
    for (int i = 0; i < block.threads && used < room; ++i) {
        if (told[i] || threads[i].state == State::exited) continue;
        int count = 0;
        for (int j = i; j < block.threads; ++j) {
            const bool same = threads[j].state == threads[i].state && threads[j].site.line == threads[i].site.line &&
                              threads[j].operation == threads[i].operation && threads[j].mask == threads[i].mask;
            if (same && threads[j].state != State::exited) told[j] = true, ++count;
        }
        const char* what = threads[i].state == State::block_wait ? "the block's barrier" : "a warp operation";
        used += std::snprintf(text + used, room - used, "%s%d thread%s at %s in line %d (mask %08x)", used ? ", " : "",
                              count, count == 1 ? " waits" : "s wait", what, threads[i].site.line, threads[i].mask);
    }
    const int exited = block.threads - block.alive;
    if (exited && used < room) std::snprintf(text + used, room - used, ", %d have returned", exited);
}

[[noreturn]] void deadlock() {
    char text[700] = "";
    describe_waiting(text, sizeof text);
    Thread* waiting = threads;
    for (int i = block.threads - 1; i >= 0; --i)
        if (threads[i].state != State::exited) waiting = &threads[i];
    current = waiting;
    threadIdx = waiting->index;
    fault("divergence", waiting->site, "the block cannot go on: %s", text);
}

void make_ready(Warp& warp, unsigned lanes) {
    warp.waiting &= ~lanes;
    warp.ready |= lanes;
    block.ready_warps |= 1u << (&warp - warps);
    for (unsigned rest = lanes; rest; rest &= rest - 1) warp.lanes[__builtin_ctz(rest)].state = State::ready;
}

/// __activemask() with every lane of a warp waiting: those at the same call are the active ones.
bool release_active_mask() {
    for (int w = 0; w < block.warps; ++w) {
        for (unsigned rest = warps[w].waiting; rest; rest &= rest - 1) {
            const Thread& first = warps[w].lanes[__builtin_ctz(rest)];
            if (first.operation != Operation::active_mask) continue;
            unsigned group = 0;
            for (unsigned other = warps[w].waiting; other; other &= other - 1) {
                const Thread& lane = warps[w].lanes[__builtin_ctz(other)];
                if (lane.operation == Operation::active_mask && lane.site.line == first.site.line)
                    group |= 1u << lane.lane();
            }
            for (unsigned member = group; member; member &= member - 1)
                *static_cast<unsigned*>(warps[w].lanes[__builtin_ctz(member)].payload) = group;
            make_ready(warps[w], group);
            return true;
        }
    }
    return false;
}

Thread* next_thread() {
    int w = current->warp();
    const bool stay = launch->seed == 0 || (random_bits() & 7) != 0;
    if (!stay || !warps[w].ready) {
        if (!block.ready_warps && !release_active_mask()) deadlock();
        w = pick_bit(block.ready_warps);
    }
    return &warps[w].lanes[pick_bit(warps[w].ready)];
}

void stop_running(State state) {
    Warp& warp = warps[current->warp()];
    current->state = state;
    warp.ready &= ~(1u << current->lane());
    if (!warp.ready) block.ready_warps &= ~(1u << current->warp());
}

void release_block() {
    block.result = block.count;
    block.arrived = 0;
    ++block.interval;
    for (int w = 0; w < block.warps; ++w) make_ready(warps[w], warps[w].alive);
}

/// The mask's living lanes all wait at this operation.
bool all_arrived(const Warp& warp, unsigned lanes, Operation operation, unsigned mask) {
    if (lanes & ~warp.waiting) return false;
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const Thread& lane = warp.lanes[__builtin_ctz(rest)];
        if (lane.operation != operation || lane.mask != mask) return false;
    }
    return true;
}

bool try_complete(Warp& warp, Operation operation, unsigned mask, Compute compute) {
    const unsigned lanes = mask & warp.alive;
    if (!all_arrived(warp, lanes, operation, mask)) return false;
    void* payloads[32];
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        payloads[lane] = warp.lanes[lane].payload;
    }
    if (compute) compute(lanes, payloads);
    make_ready(warp, lanes);
    return true;
}

Compute pending_compute[maximum_warps][32];

void thread_returned() {
    Warp& warp = warps[current->warp()];
    stop_running(State::exited);
    warp.alive &= ~(1u << current->lane());
    --block.alive;
    checks_thread_returned();
    if (block.arrived && block.arrived == block.alive) release_block();
    for (unsigned rest = warp.waiting; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        const Thread& thread = warp.lanes[lane];
        if (thread.operation == Operation::active_mask) continue;
        if (try_complete(warp, thread.operation, thread.mask, pending_compute[current->warp()][lane])) break;
    }
}

void run_thread() {
    launch->kernel->invoke(launch->arguments);
    thread_returned();
    if (block.alive == 0) leave_launch();
    resume(next_thread());
    __builtin_unreachable();
}

void prepare_block() {
    const unsigned* size = launch->block;
    block.threads = block.alive = static_cast<int>(size[0] * size[1] * size[2]);
    block.warps = (block.threads + 31) / 32;
    block.arrived = 0;
    block.ready_warps = 0;
    ++block.interval;
    ++sim_block_serial;
    for (int i = 0; i < block.threads; ++i) {
        Thread& thread = threads[i];
        thread.state = State::ready;
        thread.operation = Operation::none;
        thread.number = i;
        thread.code = nullptr;
        thread.site = {nullptr, 0};
        thread.index = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
        fiber_prepare(thread.fiber, launch->stacks + i * launch->stack_bytes, launch->stack_bytes, run_thread);
    }
    for (int w = 0; w < block.warps; ++w) {
        const int lanes = std::min(32, block.threads - 32 * w);
        const unsigned all = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
        warps[w] = {all, 0, 0, threads + 32 * w};
        make_ready(warps[w], all);
    }
    launch->static_shared = 0;
    std::memset(dynamic_shared, 0xff, launch->shared_bytes);
    copies_begin_block();
    checks_begin_block();
}

void run_block() {
    prepare_block();
    current = &warps[pick_bit(block.ready_warps)].lanes[0];
    current = &current[pick_bit(warps[current->warp()].ready)];
    threadIdx = current->index;
    fiber_switch(host, current->fiber);
}

void resume_block() {
    is_paused = false;
    fiber_switch(host, paused);
}

/// Three places: where the kernel stood, and, if that has no line, where it called the runtime or waited last.
int note_pause() {
    launch->other_address_in_code = reinterpret_cast<std::uint64_t>(last_call);
    record_fault("time limit", current->site, "the launch was paused");
    launch->fault_address_in_code = reinterpret_cast<std::uint64_t>(paused_code);
    launch->fault_kind[0] = 0;
    return 2;
}

/// False after the last block.
bool next_block() {
    if (++blockIdx.x < gridDim.x) return true;
    blockIdx.x = 0;
    if (++blockIdx.y < gridDim.y) return true;
    blockIdx.y = 0;
    return ++blockIdx.z < gridDim.z;
}

/// From where the launch stands to its end; the result as of sim_launch.
int run_blocks() {
    CrashGuard guard;
    if (sigsetjmp(guard.place, 1)) return 1;
    do {
        is_paused ? resume_block() : run_block();
        if (launch->fault_kind[0]) return 1;
        if (is_paused) return note_pause();
        checks_end_block();
        if (!next_block()) break;
        if (pause_wanted) {
            pause_wanted = 0;
            paused_code = nullptr;
            return note_pause();
        }
    } while (true);
    checks_end_launch();
    return 0;
}

}  // namespace

std::uint32_t random_bits() {  // xorshift64*, Vigna 2016
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return static_cast<std::uint32_t>((random_state * 0x2545F4914F6CDD1Dull) >> 32);
}

/// A set bit of the mask: the lowest in order, any with a seed.
int pick_bit(unsigned mask) {
    if (launch->seed == 0) return __builtin_ctz(mask);
    for (int skip = random_bits() % __builtin_popcount(mask); skip; --skip) mask &= mask - 1;
    return __builtin_ctz(mask);
}

void leave_launch() {
    runtime_busy = 0;
    Fiber abandoned;
    fiber_switch(abandoned, host);
    __builtin_unreachable();
}

void let_others_run() {
    for (int step = 1; step < block.threads; ++step) {
        Thread& next = threads[(current->number + step) % block.threads];
        if (next.state == State::ready) return resume(&next);
    }
}

void volatile_read(const void* code) {
    last_call = code;
    constexpr unsigned patience = 256;
    static const Thread* reader;
    static unsigned reads;
    if (reader != current) reader = current, reads = 0;
    if (++reads % patience == 0) let_others_run();
}

void pause_launch(const void* code) {
    pause_wanted = 0;
    is_paused = true;
    paused_code = code;
    fiber_switch(paused, host);
}

void collective(Operation operation, unsigned mask, Compute compute, void* payload, Site site) {
    Warp& warp = warps[current->warp()];
    const unsigned self = 1u << current->lane();
    current->site = site;
    if (!(mask & self))
        fault("warp mask", site, "lane %d calls a warp operation whose mask %08x does not name it", current->lane(),
              mask);
    current->operation = operation;
    current->mask = mask;
    current->payload = payload;
    pending_compute[current->warp()][current->lane()] = compute;
    stop_running(State::warp_wait);
    warp.waiting |= self;
    const bool complete = operation != Operation::active_mask && try_complete(warp, operation, mask, compute);
    if (!complete || launch->seed != 0) resume(next_thread());
}

namespace {
void record(const char* kind, Site site, const char* format, va_list values) {
    std::snprintf(launch->fault_kind, sizeof launch->fault_kind, "%s", kind);
    std::snprintf(launch->fault_file, sizeof launch->fault_file, "%s", site.file ? site.file : "");
    launch->fault_line = site.line;
    std::vsnprintf(launch->fault_message, sizeof launch->fault_message, format, values);
    const unsigned here[3] = {blockIdx.x, blockIdx.y, blockIdx.z};
    const unsigned who[3] = {threadIdx.x, threadIdx.y, threadIdx.z};
    std::copy(here, here + 3, launch->fault_block);
    std::copy(who, who + 3, launch->fault_thread);
    launch->fault_address_in_code = reinterpret_cast<std::uint64_t>(current->code);
}
}  // namespace

void record_fault(const char* kind, Site site, const char* format, ...) {
    va_list values;
    va_start(values, format);
    record(kind, site, format, values);
    va_end(values);
}

void fault(const char* kind, Site site, const char* format, ...) {
    va_list values;
    va_start(values, format);
    record(kind, site, format, values);
    va_end(values);
    leave_launch();
}

}  // namespace sim

extern "C" {

unsigned char* const sim_dynamic_shared = sim::dynamic_shared;

int sim_block_barrier(int kind, int predicate, sim::Site site) {
    using namespace sim;
    SIM_ENTER;
    if (block.arrived == 0) block.count = 0;
    block.count += predicate != 0;
    ++block.arrived;
    current->site = site;
    current->operation = Operation::barrier;
    current->mask = 0;
    checks_block_barrier(site);
    stop_running(State::block_wait);
    if (block.arrived == block.alive) {
        release_block();
        if (launch->seed != 0) resume(next_thread());
    } else {
        resume(next_thread());
    }
    if (kind == 2) return block.result == block.threads;
    return kind == 3 ? block.result != 0 : block.result;
}

void sim_trap(const char* what, sim::Site site) {
    SIM_ENTER;
    sim::fault("trap", site, "%s", what);
}

void sim_declare_shared(const void* address, std::size_t bytes, const char* name, sim::Site site) {
    using namespace sim;
    SIM_ENTER;
    std::memset(const_cast<void*>(address), 0xff, bytes);
    launch->static_shared += bytes;
    if (launch->static_shared > launch->static_limit)
        fault("shared memory", site, "the kernel's static shared memory passes %llu bytes with %s (%zu bytes)",
              static_cast<unsigned long long>(launch->static_limit), name, bytes);
    checks_declare_shared(address, bytes, name);
}

/// Runs the launch; 0 when it came to its end, 1 with a finding in the launch's fault fields, 2 when it was paused:
/// then these say where, and sim_continue goes on (or another sim_launch abandons it).
__attribute__((visibility("default"))) int sim_launch(sim::Launch* request) {
    using namespace sim;
    launch = request;
    request->fault_line = request->other_line = 0;
    request->fault_address_in_code = request->other_address_in_code = 0;
    random_state = request->seed * 0x9E3779B97F4A7C15ull + 0x632BE59BD9B4E019ull;
    blockDim = dim3(request->block[0], request->block[1], request->block[2]);
    gridDim = dim3(request->grid[0], request->grid[1], request->grid[2]);
    blockIdx = {0, 0, 0};
    request->fault_kind[0] = 0;
    runtime_busy = pause_wanted = 0;
    is_paused = false;
    last_call = nullptr;
    checks_begin_launch();
    return run_blocks();
}

__attribute__((visibility("default"))) int sim_continue() { return sim::run_blocks(); }
}
