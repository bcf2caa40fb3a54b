// Memory for the stacks of simulated threads, each with an unreadable page at its low end.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

extern "C" __attribute__((visibility("default"))) void* sim_allocate_stacks(std::uint64_t count, std::uint64_t bytes) {
    void* memory = mmap(nullptr, count * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    const long page = sysconf(_SC_PAGESIZE);
    for (std::uint64_t i = 0; i < count; ++i)
        if (mprotect(static_cast<char*>(memory) + i * bytes, page, PROT_NONE)) return nullptr;
    return memory;
}
