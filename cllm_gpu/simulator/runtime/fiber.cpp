#include "fiber.hpp"

#include <cstdint>

#if defined(__APPLE__)
#define SIM_SYMBOL "_sim_switch_stack"
#else
#define SIM_SYMBOL "sim_switch_stack"
#endif

#if defined(__x86_64__) && !defined(SIM_USE_UCONTEXT)
// System V: rbx, rbp, r12-r15 belong to the caller; the rest is saved by the compiler around the call.
asm(".text\n"
    ".p2align 4\n" SIM_SYMBOL ":\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
#elif defined(__aarch64__) && !defined(SIM_USE_UCONTEXT)
// AAPCS64: x19-x28, the frame pointer x29, the link register x30 and d8-d15 belong to the caller.
asm(".text\n"
    ".p2align 4\n" SIM_SYMBOL ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
#endif

namespace sim {

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(SIM_USE_UCONTEXT)

extern "C" void sim_switch_stack(void** save, void* load);

void fiber_prepare(Fiber& fiber, void* stack, std::size_t bytes, FiberMain main) {
    const std::uintptr_t end = reinterpret_cast<std::uintptr_t>(stack) + bytes;
    auto* top = reinterpret_cast<std::uintptr_t*>(end & ~std::uintptr_t{15});
#if defined(__x86_64__)
    *--top = 0;                                      // at a function's first instruction rsp + 8 is a multiple of 16
    *--top = reinterpret_cast<std::uintptr_t>(main);  // popped by ret
    for (int i = 0; i < 6; ++i) *--top = 0;           // the six saved registers
#else
    top -= 20;
    for (int i = 0; i < 20; ++i) top[i] = 0;
    top[11] = reinterpret_cast<std::uintptr_t>(main);  // x30, where ret goes
#endif
    fiber.stack_pointer = top;
}

void fiber_switch(Fiber& from, Fiber& to) { sim_switch_stack(&from.stack_pointer, to.stack_pointer); }

#else

void fiber_prepare(Fiber& fiber, void* stack, std::size_t bytes, FiberMain main) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, main, 0);
}

void fiber_switch(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace sim
