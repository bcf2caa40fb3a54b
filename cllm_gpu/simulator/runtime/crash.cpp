#include "crash.hpp"

#include <dlfcn.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>

#include "runtime.hpp"

namespace sim {
namespace {

constexpr int signals[7] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGURG};
alignas(16) char signal_stack[64 * 1024];
CrashGuard* guard;

/// The address lies in the page that ends the running thread's stack.
bool is_stack_end(std::uintptr_t address) {
    const auto low = reinterpret_cast<std::uintptr_t>(launch->stacks) + current->number * launch->stack_bytes;
    return address >= low && address < low + static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
}

/// The instruction at which a signal came, 0 where the platform is unknown.
std::uintptr_t interrupted_at(void* context) {
    [[maybe_unused]] const auto* state = static_cast<const ucontext_t*>(context);
#if defined(__linux__) && defined(__x86_64__)
    return static_cast<std::uintptr_t>(state->uc_mcontext.gregs[REG_RIP]);
#elif defined(__linux__) && defined(__aarch64__)
    return state->uc_mcontext.pc;
#elif defined(__APPLE__) && defined(__x86_64__)
    return state->uc_mcontext->__ss.__rip;
#elif defined(__APPLE__) && defined(__aarch64__)
    return __darwin_arm_thread_state64_get_pc(state->uc_mcontext->__ss);
#else
    return 0;
#endif
}

const void* library_of(const void* address) {
    Dl_info info;
    return dladdr(address, &info) ? info.dli_fbase : nullptr;
}

bool is_own_code(std::uintptr_t instruction) {
    return instruction && library_of(reinterpret_cast<void*>(instruction)) == library_of(&guard);
}

/// In the mathematical library, which holds no locks.
bool is_math(std::uintptr_t instruction) {
    const auto function = static_cast<double (*)(double)>(std::exp);
    return instruction &&
           library_of(reinterpret_cast<void*>(instruction)) == library_of(reinterpret_cast<void*>(function));
}

bool is_on_thread_stack() {
    char here;
    const auto low = reinterpret_cast<std::uintptr_t>(launch->stacks);
    const auto address = reinterpret_cast<std::uintptr_t>(&here);
    return address >= low && address < low + maximum_threads * launch->stack_bytes;
}

/// As a return address, as all others in a report are.
const void* code_of(std::uintptr_t instruction) {
    return is_own_code(instruction) ? reinterpret_cast<const void*>(instruction + 1) : nullptr;
}

/// Where the simulated code can stop, it does at once; elsewhere (a lock may be held) at the runtime's next turn.
void on_pause(void* context) {
    const std::uintptr_t instruction = interrupted_at(context);
    if (!runtime_busy && is_on_thread_stack() && (is_own_code(instruction) || is_math(instruction)))
        pause_launch(code_of(instruction));
    else
        pause_wanted = 1;
}

const char* crash_message(int signal) {
    switch (signal) {
        case SIGABRT: return "the kernel aborts";
        case SIGILL:
        case SIGTRAP: return "the kernel runs into __builtin_trap(), or an invalid instruction";
        default: return "an access to an invalid or misaligned address; check=True finds where";
    }
}

}  // namespace

void on_crash(int signal, siginfo_t* info, void* context) {
    if (!pthread_equal(pthread_self(), guard->thread_)) {  // not ours: as if this handler were not there
        if (signal == SIGURG) return;
        for (int i = 0; i < CrashGuard::count; ++i)
            if (signals[i] == signal) sigaction(signal, &guard->before_[i], nullptr);
        if (signal == SIGABRT) raise(signal);
        return;
    }
    if (signal == SIGURG) return on_pause(context);
    const Site nowhere{nullptr, 0};
    current->code = code_of(interrupted_at(context));
    if (signal == SIGFPE)
        record_fault("arithmetic", nowhere, "an integer division by zero");
    else if ((signal == SIGSEGV || signal == SIGBUS) && is_stack_end(reinterpret_cast<std::uintptr_t>(info->si_addr)))
        record_fault("crash", nowhere, "local memory passes the %llu bytes a simulated thread has",
                     static_cast<unsigned long long>(launch->stack_bytes));
    else
        record_fault(signal == SIGSEGV || signal == SIGBUS ? "crash" : "trap", nowhere, "%s", crash_message(signal));
    siglongjmp(guard->place, 1);
}

CrashGuard::CrashGuard() : thread_(pthread_self()) {
    guard = this;
    stack_t own{};
    own.ss_sp = signal_stack;
    own.ss_size = sizeof signal_stack;
    sigaltstack(&own, &stack_before_);
    struct sigaction action {};
    action.sa_sigaction = on_crash;
    for (int i = 0; i < count; ++i) {
        // A pause leaves its handler by a switch of stacks: it runs on the simulated thread's own, nothing blocked.
        action.sa_flags = signals[i] == SIGURG ? SA_SIGINFO | SA_RESTART | SA_NODEFER : SA_SIGINFO | SA_ONSTACK;
        sigaction(signals[i], &action, &before_[i]);
    }
}

CrashGuard::~CrashGuard() {
    for (int i = 0; i < count; ++i) sigaction(signals[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
    guard = nullptr;
}

}  // namespace sim
