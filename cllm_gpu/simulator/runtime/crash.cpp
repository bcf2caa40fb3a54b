#include "crash.hpp"

#include <unistd.h>

#include <cstdint>

#include "runtime.hpp"

namespace sim {
namespace {

constexpr int signals[3] = {SIGSEGV, SIGBUS, SIGFPE};
alignas(16) char signal_stack[64 * 1024];
CrashGuard* guard;

/// The address lies in the page that ends the running thread's stack.
bool is_stack_end(std::uintptr_t address) {
    const auto low = reinterpret_cast<std::uintptr_t>(launch->stacks) + current->number * launch->stack_bytes;
    return address >= low && address < low + static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
}

void on_crash(int signal, siginfo_t* info, void*) {
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    const Site nowhere{nullptr, 0};
    current->code = nullptr;
    if (signal == SIGFPE)
        record_fault("arithmetic", nowhere, "an integer division by zero");
    else if (is_stack_end(address))
        record_fault("crash", nowhere, "local memory passes the %llu bytes a simulated thread has",
                     static_cast<unsigned long long>(launch->stack_bytes));
    else
        record_fault("crash", nowhere, "an access to an invalid or misaligned address; check=True finds where");
    siglongjmp(guard->place, 1);
}

}  // namespace

CrashGuard::CrashGuard() {
    guard = this;
    stack_t own{};
    own.ss_sp = signal_stack;
    own.ss_size = sizeof signal_stack;
    sigaltstack(&own, &stack_before_);
    struct sigaction action {};
    action.sa_sigaction = on_crash;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 3; ++i) sigaction(signals[i], &action, &before_[i]);
}

CrashGuard::~CrashGuard() {
    for (int i = 0; i < 3; ++i) sigaction(signals[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
    guard = nullptr;
}

}  // namespace sim
