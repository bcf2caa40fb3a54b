// One entry point of the library: name, types, address. The types are read off the function itself.
#pragma once

#include <type_traits>

struct Entry {
    const char* name;   // null: the end of a table
    const char* types;  // of the result, then of the arguments: a letter each, as in library.py
    void (*function)();
};

template <class A> constexpr char letter() {
    if constexpr (std::is_void_v<A>) return 'v';
    else if constexpr (std::is_pointer_v<A>) return 'p';
    else if constexpr (std::is_same_v<A, float>) return 'f';
    else if constexpr (std::is_same_v<A, double>) return 'd';
    else {
        static_assert(std::is_integral_v<A> && (sizeof(A) == 8 || sizeof(A) == 4), "library.py knows no such type");
        return sizeof(A) == 8 ? (std::is_signed_v<A> ? 'i' : 'u') : (std::is_signed_v<A> ? 'n' : 'w');
    }
}

template <class R, class... A> Entry entry(const char* name, R (*function)(A...)) {
    static constexpr char types[] = {letter<R>(), letter<A>()..., 0};
    return {name, types, reinterpret_cast<void (*)()>(function)};
}

#define ENTRY(name) entry(#name, &name<T>)
