// In an unchecked build a kernel that has volatile variables is compiled with -fsanitize=thread for the calls at its
// volatile reads, at which other threads get a turn. The calls at all other accesses do nothing.
#ifndef SIM_CHECKED
#include <cstring>

#include "runtime.hpp"

#define SIM_READ sim::volatile_read(__builtin_return_address(0))
#define SIM_ACCESSES(bytes) \
    void __tsan_read##bytes(void*) {} \
    void __tsan_write##bytes(void*) {} \
    void __tsan_unaligned_read##bytes(void*) {} \
    void __tsan_unaligned_write##bytes(void*) {} \
    void __tsan_volatile_read##bytes(void*) { SIM_READ; } \
    void __tsan_volatile_write##bytes(void*) {} \
    void __tsan_unaligned_volatile_read##bytes(void*) { SIM_READ; } \
    void __tsan_unaligned_volatile_write##bytes(void*) {} \
    void __tsan_read_write##bytes(void*) {} \
    void __tsan_unaligned_read_write##bytes(void*) {}

extern "C" {
SIM_ACCESSES(1)
SIM_ACCESSES(2)
SIM_ACCESSES(4)
SIM_ACCESSES(8)
SIM_ACCESSES(16)
void __tsan_read_range(void*, unsigned long) {}
void __tsan_write_range(void*, unsigned long) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) { return std::memcpy(to, from, bytes); }
void* __tsan_memmove(void* to, const void* from, unsigned long bytes) { return std::memmove(to, from, bytes); }
void* __tsan_memset(void* to, int value, unsigned long bytes) { return std::memset(to, value, bytes); }
}
#endif
