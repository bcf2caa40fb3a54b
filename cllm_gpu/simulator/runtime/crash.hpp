// Turns a crash of simulated code (a wild pointer, a full stack, a division by zero) into a report.
#pragma once
#include <csetjmp>
#include <csignal>

namespace sim {

/// While it lives, SIGSEGV, SIGBUS and SIGFPE record a fault and continue at `place` (set it by sigsetjmp).
class CrashGuard {
public:
    CrashGuard();
    ~CrashGuard();
    CrashGuard(const CrashGuard&) = delete;
    CrashGuard& operator=(const CrashGuard&) = delete;
    sigjmp_buf place;

private:
    struct sigaction before_[3];
    stack_t stack_before_;
};

}  // namespace sim
