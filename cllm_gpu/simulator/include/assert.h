// Device code's assert, also by <cassert>: reported with line, block and thread rather than ending the process.
#undef assert
#ifdef NDEBUG
#define assert(condition) static_cast<void>(0)
#else
#define assert(condition)                                                    \
    ((condition) ? static_cast<void>(0)                                      \
                 : sim_trap("assertion failed: " #condition, sim::Site{__FILE__, __LINE__}))
#endif
