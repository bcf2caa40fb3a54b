// Signals while simulated code runs: a crash of it (a wild pointer, a full stack, a division by zero) becomes a report,
// and a request to pause lets Python look whether the launch shall go on.
#pragma once
#include <csetjmp>
#include <csignal>
#include <pthread.h>

namespace sim {

/// While it lives, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP and SIGABRT record a fault and continue at `place` (set it
/// by sigsetjmp), and SIGURG pauses the launch. Those of other threads go to the handlers that were there before.
class CrashGuard {
public:
    CrashGuard();
    ~CrashGuard();
    CrashGuard(const CrashGuard&) = delete;
    CrashGuard& operator=(const CrashGuard&) = delete;
    sigjmp_buf place;

private:
    friend void on_crash(int, siginfo_t*, void*);
    static constexpr int count = 7;
    struct sigaction before_[count];
    stack_t stack_before_;
    pthread_t thread_;
};

}  // namespace sim
