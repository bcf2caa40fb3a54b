// cp.async: each thread's copies form groups; wait_group N completes all but the newest N groups of that thread.
#include "copies.hpp"

#include <cstring>
#include <vector>

#include "checks.hpp"
#include "runtime.hpp"

namespace {

struct Copy {
    unsigned char* shared;
    const unsigned char* global;
    int bytes, source_bytes;
    unsigned group;
    sim::Site site;
    const void* code;
};

struct Queue {
    std::vector<Copy> copies;  // in order of issue
    unsigned group = 0;        // number of the open group
};

Queue queues[sim::maximum_threads];

void perform(const Copy& copy) {
    std::memcpy(copy.shared, copy.global, copy.source_bytes);
    std::memset(copy.shared + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

}  // namespace

void copies_begin_block() {
    for (int i = 0; i < sim::block.threads; ++i) {
        queues[i].copies.clear();
        queues[i].group = 0;
    }
}

extern "C" {

void sim_copy_async(void* shared, const void* global, int bytes, int source_bytes, sim::Site site) {
    SIM_ENTER;
    const sim::Busy busy(sim::current->code);
    checks_copy_issued(shared, global, bytes, source_bytes, site);
    Queue& queue = queues[sim::current->number];
    const Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes,
                    source_bytes, queue.group, site, sim::current->code};
    if (!sim::launch->lazy_copies) perform(copy);
    queue.copies.push_back(copy);
}

void sim_copy_commit() { ++queues[sim::current->number].group; }

void sim_copy_wait(int pending_groups) {
    SIM_ENTER;
    const sim::Busy busy(sim::current->code);
    Queue& queue = queues[sim::current->number];
    std::size_t done = 0;
    for (; done < queue.copies.size(); ++done) {
        const Copy& copy = queue.copies[done];
        // A group is complete when it is committed and not among the newest `pending_groups` committed ones.
        if (static_cast<long long>(copy.group) >= static_cast<long long>(queue.group) - pending_groups) break;
        if (sim::launch->lazy_copies) perform(copy);
        checks_copy_done(copy.shared, copy.bytes, copy.site, copy.code);
    }
    queue.copies.erase(queue.copies.begin(), queue.copies.begin() + done);
}
}
