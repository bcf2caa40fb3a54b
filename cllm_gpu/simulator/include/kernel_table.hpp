// What a kernel's parameters are, as the compiler sees them: the launch checks NumPy arguments against this table.
#pragma once
#include <cstddef>
#include <type_traits>
#include <utility>

namespace sim {

/// Letters of NumPy's type kinds: 'f' floating, 'i' signed, 'u' unsigned, 'b' bool, 'V' anything else, 'P' pointer.
struct Parameter {
    char kind;
    char pointee_kind;
    int size;
    int pointee_size;
    int is_const;
};

struct Kernel {
    void (*invoke)(void** arguments);
    const Parameter* parameters;
    int count;
};

/// A __device__ or __constant__ variable.
struct Variable {
    const void* address;
    std::size_t bytes;
};

template <class T>
constexpr char kind_of() {
    if (std::is_same_v<T, bool>) return 'b';
    if (std::is_floating_point_v<T>) return 'f';
    if (std::is_integral_v<T>) return std::is_signed_v<T> ? 'i' : 'u';
    return std::is_pointer_v<T> ? 'P' : 'V';
}

template <class T>
constexpr int size_of() {
    if constexpr (std::is_void_v<T>) return 0;
    else return sizeof(T);
}

template <class T>
constexpr Parameter describe() {
    if constexpr (std::is_pointer_v<T>) {
        using Pointee = std::remove_cv_t<std::remove_pointer_t<T>>;
        return {'P', kind_of<Pointee>(), 8, size_of<Pointee>(), std::is_const_v<std::remove_pointer_t<T>>};
    } else {
        return {kind_of<T>(), 'V', sizeof(T), 0, 0};
    }
}

template <auto kernel>
struct Entry;

template <class... P, void (*kernel)(P...)>
struct Entry<kernel> {
    static constexpr Parameter parameters[sizeof...(P) + 1] = {describe<std::remove_cv_t<P>>()..., {}};
    template <std::size_t... i>
    __attribute__((no_sanitize("thread", "undefined"))) static void call(void** arguments, std::index_sequence<i...>) {
        kernel(*static_cast<std::remove_reference_t<P>*>(arguments[i])...);
    }
    static void invoke(void** arguments) { call(arguments, std::index_sequence_for<P...>{}); }
    static constexpr Kernel table{&invoke, parameters, sizeof...(P)};
};

}  // namespace sim
