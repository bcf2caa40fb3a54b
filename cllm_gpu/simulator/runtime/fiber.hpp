// Switching between the stacks of simulated threads: a few instructions on x86-64 and AArch64, ucontext elsewhere.
#pragma once
#include <cstddef>

namespace sim {

using FiberMain = void (*)();

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(SIM_USE_UCONTEXT)
struct Fiber {
    void* stack_pointer = nullptr;
};
#else
}  // namespace sim
#include <ucontext.h>
namespace sim {
struct Fiber {
    ucontext_t context;
};
#endif

/// Prepares `fiber` so that the first switch to it calls `main` on the given stack; `main` must never return.
void fiber_prepare(Fiber& fiber, void* stack, std::size_t bytes, FiberMain main);

/// Saves the running fiber in `from` and continues `to` where it stopped.
void fiber_switch(Fiber& from, Fiber& to);

}  // namespace sim
