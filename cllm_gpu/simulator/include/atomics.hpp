// Atomic operations. Threads of the simulator take turns on one processor thread, so a plain read-modify-write between
// two switches is atomic; the runtime is told, for range checks and for the ordering between blocks.
#pragma once
#include "runtime_api.hpp"

namespace sim {
template <class T, class F>
__attribute__((no_sanitize("thread"), noinline)) T read_modify_write(T* address, Site site, F update) {
    sim_atomic_access(address, sizeof(T), site);
    const T old = *address;
    *address = update(old);
    return old;
}
template <class T>
using Same = std::common_type_t<T>;  // keeps the second operand from taking part in deduction
}  // namespace sim

#define SIM_ATOMIC(name, expression)                                                                              \
    template <class T>                                                                                            \
    __forceinline__ T name(T* address, sim::Same<T> value, SIM_HERE) {                                            \
        return sim::read_modify_write(address, SIM_SITE,                                                          \
                                      [=](T old) __attribute__((no_sanitize("thread"))) -> T { return expression; }); \
    }                                                                                                             \
    template <class T>                                                                                            \
    __forceinline__ T name##_block(T* address, sim::Same<T> value, SIM_HERE) {                                    \
        return name(address, value, file, line);                                                                  \
    }                                                                                                             \
    template <class T>                                                                                            \
    __forceinline__ T name##_system(T* address, sim::Same<T> value, SIM_HERE) {                                   \
        return name(address, value, file, line);                                                                  \
    }
SIM_ATOMIC(atomicAdd, old + value)
SIM_ATOMIC(atomicSub, old - value)
SIM_ATOMIC(atomicExch, (static_cast<void>(old), value))
SIM_ATOMIC(atomicMin, value < old ? value : old)
SIM_ATOMIC(atomicMax, old < value ? value : old)
SIM_ATOMIC(atomicAnd, old & value)
SIM_ATOMIC(atomicOr, old | value)
SIM_ATOMIC(atomicXor, old ^ value)
SIM_ATOMIC(atomicInc, old >= value ? T(0) : T(old + 1))
SIM_ATOMIC(atomicDec, (old == 0 || old > value) ? value : T(old - 1))
#undef SIM_ATOMIC

template <class T>
__forceinline__ T atomicCAS(T* address, sim::Same<T> compare, sim::Same<T> value, SIM_HERE) {
    return sim::read_modify_write(address, SIM_SITE, [=](T old) __attribute__((no_sanitize("thread"))) -> T {
        return old == compare ? value : old;
    });
}

namespace sim {
__forceinline__ void wait_for(const unsigned* address, unsigned value, SIM_HERE) {
    sim_wait_for(address, value, SIM_SITE);
}
}  // namespace sim

template <class T>
__forceinline__ T __ldg(const T* address) { return *address; }
template <class T>
__forceinline__ T __ldcs(const T* address) { return *address; }
template <class T>
__forceinline__ T __ldcg(const T* address) { return *address; }
template <class T>
__forceinline__ T __ldca(const T* address) { return *address; }
template <class T>
__forceinline__ void __stcs(T* address, sim::Same<T> value) { *address = value; }
template <class T>
__forceinline__ void __stcg(T* address, sim::Same<T> value) { *address = value; }
