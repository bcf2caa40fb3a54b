// Fences, clocks, atomics and tensor-core instructions of a simulated thread.
#include <cstring>

#include "checks.hpp"
#include "runtime.hpp"

extern "C" {

void sim_memory_fence(int scope) {
    SIM_ENTER;
    checks_fence(scope);
}

unsigned long long sim_clock() {
    SIM_ENTER;
    static unsigned long long ticks = 0;
    return ++ticks;
}

void sim_let_others_run() {
    SIM_ENTER;
    sim::let_others_run();
}

void sim_atomic_access(const void* address, int bytes, sim::Site site) {
    SIM_ENTER;
    checks_atomic(address, bytes, site);
    static unsigned atomics = 0;
    if (++atomics % 64 == 0) sim::let_others_run();  // the thread may be waiting for another one at a lock
}

void sim_wait_for(const unsigned* address, unsigned value, sim::Site site) {
    SIM_ENTER;
    checks_wait(address, sizeof *address, site);
    if (*address == value) return;
    sim::fault("waiting", site, "waits for another block, which has not run, to write %u where %u stands", value,
               *address);
}
}
