// The functions of C that end the process: called by a kernel they end its launch. The kernel is linked with these,
// hidden from the rest of the process.
#include "runtime.hpp"

namespace {
[[noreturn]] void end_launch(const char* what, const void* caller, sim::Site site = {nullptr, 0}) {
    sim::current->code = caller;
    sim::fault("trap", site, "%s", what);
}
}  // namespace

#define SIM_TEXT(x) #x
#define SIM_TEXT_OF(x) SIM_TEXT(x)
#define SIM_HIDDEN __attribute__((visibility("hidden"), noreturn))
// Under names of our own in C++: what the compiler knows by its name, it makes visible.
#define SIM_ENDS(name, what)                                                      \
    SIM_HIDDEN void sim_end_##name() asm(SIM_TEXT_OF(__USER_LABEL_PREFIX__) #name); \
    void sim_end_##name() { end_launch(what, __builtin_return_address(0)); }

extern "C" {
SIM_ENDS(abort, "the kernel calls abort()")
SIM_ENDS(exit, "the kernel calls exit()")
SIM_ENDS(_exit, "the kernel calls _exit()")
SIM_ENDS(_Exit, "the kernel calls _Exit()")
SIM_ENDS(quick_exit, "the kernel calls quick_exit()")
SIM_ENDS(__cxa_throw, "the kernel throws an exception")
}
