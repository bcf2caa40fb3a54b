// What an entry point that can fail returns; library.py makes exceptions of it.
#pragma once

#include <new>

enum Status : int { DONE = 0, NO_MEMORY = 1, BAD_INDEX = 2 };

// What `work` returns; NO_MEMORY where it runs out of memory
template <class F> int guarded(F work) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}
