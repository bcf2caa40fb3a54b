// The calls that the compiler's own instrumentation makes: -fsanitize=thread reports each memory access, and
// -fsanitize=alignment,bounds,… each broken rule of the language. The sanitizers' libraries are not linked; these
// functions stand in their place.
#include <cstdio>

#include "checks.hpp"
#include "shadow.hpp"

namespace {

inline void access(const void* address, int bytes, bool write, const void* caller) {
    if (sim::launch == nullptr || sim::current == nullptr) return;
    sim::check_access(reinterpret_cast<std::uintptr_t>(address), bytes, write, false, sim::Code{caller, {nullptr, 0}});
}

/// An access that the compiler takes to be aligned (to 8 bytes at most: it does not tell more).
inline void aligned_access(const void* address, int bytes, bool write, const void* caller) {
    const int alignment = bytes < 8 ? bytes : 8;
    if (reinterpret_cast<std::uintptr_t>(address) % alignment) {
        char text[200];
        std::snprintf(text, sizeof text, "%s %d bytes at an address that is not a multiple of %d",
                      write ? "writes" : "reads", bytes, alignment);
        sim::fault_in("misaligned", sim::Code{caller, {nullptr, 0}}, text);
    }
    access(address, bytes, write, caller);
}

struct SourceLocation {
    const char* file;
    unsigned line, column;
};

struct TypeDescriptor {
    unsigned short kind, info;
    char name[1];
};

struct TypeMismatch {
    SourceLocation where;
    const TypeDescriptor* type;
    unsigned char log_alignment, check_kind;
};

struct OutOfBounds {
    SourceLocation where;
    const TypeDescriptor* array;
    const TypeDescriptor* index;
};

[[noreturn]] void report(const char* kind, const SourceLocation& where, const char* text, const void* caller) {
    sim::current->code = caller;
    sim::fault(kind, sim::Site{where.file, static_cast<int>(where.line)}, "%s", text);
}

}  // namespace

#define SIM_CALLER __builtin_return_address(0)
#define SIM_ACCESSES(bytes)                                                                           \
    void __tsan_read##bytes(void* p) { aligned_access(p, bytes, false, SIM_CALLER); }                 \
    void __tsan_write##bytes(void* p) { aligned_access(p, bytes, true, SIM_CALLER); }                 \
    void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, false, SIM_CALLER); }               \
    void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, true, SIM_CALLER); }               \
    void __tsan_volatile_read##bytes(void* p) {                                                       \
        aligned_access(p, bytes, false, SIM_CALLER);                                                  \
        sim::volatile_read(SIM_CALLER);                                                               \
    }                                                                                                 \
    void __tsan_volatile_write##bytes(void* p) { aligned_access(p, bytes, true, SIM_CALLER); }        \
    void __tsan_unaligned_volatile_read##bytes(void* p) {                                             \
        access(p, bytes, false, SIM_CALLER);                                                          \
        sim::volatile_read(SIM_CALLER);                                                               \
    }                                                                                                 \
    void __tsan_unaligned_volatile_write##bytes(void* p) { access(p, bytes, true, SIM_CALLER); }      \
    void __tsan_read_write##bytes(void* p) {                                                          \
        access(p, bytes, false, SIM_CALLER);                                                          \
        access(p, bytes, true, SIM_CALLER);                                                           \
    }                                                                                                 \
    void __tsan_unaligned_read_write##bytes(void* p) {                                                \
        access(p, bytes, false, SIM_CALLER);                                                          \
        access(p, bytes, true, SIM_CALLER);                                                           \
    }

extern "C" {
SIM_ACCESSES(1)
SIM_ACCESSES(2)
SIM_ACCESSES(4)
SIM_ACCESSES(8)
SIM_ACCESSES(16)

void __tsan_read_range(void* p, unsigned long bytes) { access(p, static_cast<int>(bytes), false, SIM_CALLER); }
void __tsan_write_range(void* p, unsigned long bytes) { access(p, static_cast<int>(bytes), true, SIM_CALLER); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Clang calls these for large copies in instrumented code.
void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) {
    access(from, static_cast<int>(bytes), false, SIM_CALLER);
    access(to, static_cast<int>(bytes), true, SIM_CALLER);
    return __builtin_memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, unsigned long bytes) {
    access(from, static_cast<int>(bytes), false, SIM_CALLER);
    access(to, static_cast<int>(bytes), true, SIM_CALLER);
    return __builtin_memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, unsigned long bytes) {
    access(to, static_cast<int>(bytes), true, SIM_CALLER);
    return __builtin_memset(to, value, bytes);
}

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, unsigned long pointer) {
    char text[300];
    if (pointer == 0) report("out of range", data->where, "follows a null pointer", SIM_CALLER);
    std::snprintf(text, sizeof text, "accesses %s at an address that is not a multiple of %u (it ends in 0x%02lx)",
                  data->type->name, 1u << data->log_alignment, pointer & 0xff);
    report("misaligned", data->where, text, SIM_CALLER);
}

void __ubsan_handle_out_of_bounds(OutOfBounds* data, unsigned long index) {
    char text[300];
    std::snprintf(text, sizeof text, "index %ld is out of bounds for %s", static_cast<long>(index), data->array->name);
    report("out of range", data->where, text, SIM_CALLER);
}

#define SIM_ARITHMETIC(name, what)                                            \
    void __ubsan_handle_##name(SourceLocation* where, unsigned long, unsigned long) { \
        report("arithmetic", *where, what, SIM_CALLER);                           \
    }
SIM_ARITHMETIC(add_overflow, "a signed sum overflows")
SIM_ARITHMETIC(sub_overflow, "a signed difference overflows")
SIM_ARITHMETIC(mul_overflow, "a signed product overflows")
SIM_ARITHMETIC(negate_overflow, "a signed negation overflows")
SIM_ARITHMETIC(divrem_overflow, "divides by zero, or the quotient overflows")
SIM_ARITHMETIC(shift_out_of_bounds, "shifts by less than 0 or by the width of the type or more")
}
