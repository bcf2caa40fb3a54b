// Vectors of the target's widest registers, by the vector extensions of g++ and clang++. No intrinsics, so one source
// serves AVX-512, AVX2, SSE and NEON.
//
// vec<T> is a register of lanes<T> elements. Loads and stores may be unaligned. A loop over n elements is written
//     for (i = 0; i < n; i += lanes<T>) { V x = load(p + i, n - i); ...; store(p + i, x, n - i); }
// where load gives zeros and store writes nothing past the last element.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#define CLLM_VECTOR_BYTES 64
#elif defined(__AVX__)
#define CLLM_VECTOR_BYTES 32
#else
#define CLLM_VECTOR_BYTES 16
#endif
#define INLINE inline __attribute__((always_inline))

using index_t = std::int64_t;

template <class T> struct vector_types;
template <> struct vector_types<float> {
    typedef float value __attribute__((vector_size(CLLM_VECTOR_BYTES)));
    typedef float unaligned __attribute__((vector_size(CLLM_VECTOR_BYTES), aligned(4), may_alias));
    typedef std::int32_t integer __attribute__((vector_size(CLLM_VECTOR_BYTES)));
    typedef std::int32_t lane;
    typedef std::int32_t unaligned_integer __attribute__((vector_size(CLLM_VECTOR_BYTES), aligned(4), may_alias));
};
template <> struct vector_types<double> {
    typedef double value __attribute__((vector_size(CLLM_VECTOR_BYTES)));
    typedef double unaligned __attribute__((vector_size(CLLM_VECTOR_BYTES), aligned(8), may_alias));
    typedef std::int64_t integer __attribute__((vector_size(CLLM_VECTOR_BYTES)));
    typedef std::int64_t lane;
    typedef std::int64_t unaligned_integer __attribute__((vector_size(CLLM_VECTOR_BYTES), aligned(8), may_alias));
};
template <class T> using vec = typename vector_types<T>::value;
template <class T> using ivec = typename vector_types<T>::integer;
template <class T> using lane_t = typename vector_types<T>::lane;  // the integer as wide as T
template <class T> constexpr int lanes = CLLM_VECTOR_BYTES / sizeof(T);

template <class T> INLINE vec<T> splat(T x) { return x - vec<T>{}; }  // x - 0 is x, so this is one broadcast
template <class T> INLINE vec<T> load(const T* p) {
    return *reinterpret_cast<const typename vector_types<T>::unaligned*>(p);
}
template <class T> INLINE ivec<T> load_integers(const lane_t<T>* p) {
    return *reinterpret_cast<const typename vector_types<T>::unaligned_integer*>(p);
}
template <class T> INLINE void store(T* p, vec<T> x) {
    *reinterpret_cast<typename vector_types<T>::unaligned*>(p) = x;
}
template <class T> INLINE vec<T> load(const T* p, index_t count) {
    if (count >= lanes<T>) return load(p);
    vec<T> x{};
    std::memcpy(&x, p, count * sizeof(T));
    return x;
}
template <class T> INLINE void store(T* p, vec<T> x, index_t count) {
    if (count >= lanes<T>) return store(p, x);
    std::memcpy(p, &x, count * sizeof(T));
}

// ---- permutations of lanes

#if defined(__clang__) || __GNUC__ >= 12
#define CLLM_SHUFFLE(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CLLM_SHUFFLE(T, a, b, ...) __builtin_shuffle(a, b, ivec<T>{__VA_ARGS__})
#endif

template <int... I> struct sequence {};
template <int N, int... I> struct make_sequence : make_sequence<N - 1, N - 1, I...> {};
template <int... I> struct make_sequence<0, I...> { using type = sequence<I...>; };

template <class T, int... I> INLINE vec<T> interleave_low(vec<T> a, vec<T> b, sequence<I...>) {
    return CLLM_SHUFFLE(T, a, b, (I / 2 + (I % 2) * lanes<T>)...);  // a0 b0 a1 b1 ...
}
template <class T, int... I> INLINE vec<T> interleave_high(vec<T> a, vec<T> b, sequence<I...>) {
    return CLLM_SHUFFLE(T, a, b, (I / 2 + lanes<T> / 2 + (I % 2) * lanes<T>)...);
}

// Transposes a square of lanes<T> vectors in registers: log2(lanes) rounds, each interleaving x[i] with x[i + half].
template <class T> INLINE void transpose(vec<T> (&x)[lanes<T>]) {
    constexpr int n = lanes<T>;
    typename make_sequence<n>::type order;
    vec<T> y[n];
#pragma GCC unroll 4
    for (int round = 1; round < n; round *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < n / 2; ++i) {
            y[2 * i] = interleave_low<T>(x[i], x[i + n / 2], order);
            y[2 * i + 1] = interleave_high<T>(x[i], x[i + n / 2], order);
        }
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) x[i] = y[i];
    }
}

template <class T, int... I> INLINE vec<T> swap_neighbours(vec<T> x, sequence<I...>) {
    return CLLM_SHUFFLE(T, x, x, (I ^ 1)...);  // x1 x0 x3 x2 ...
}
template <class T, int... I> INLINE ivec<T> lane_numbers(sequence<I...>) { return ivec<T>{I...}; }
template <class T> INLINE ivec<T> lane_numbers() {
    return lane_numbers<T>(typename make_sequence<lanes<T>>::type());
}
template <class T> INLINE vec<T> swap_neighbours(vec<T> x) {
    return swap_neighbours<T>(x, typename make_sequence<lanes<T>>::type());
}

// ---- comparisons, roots, sums

template <class T> INLINE vec<T> select(ivec<T> mask, vec<T> yes, vec<T> no) { return mask ? yes : no; }
template <class T> INLINE vec<T> maximum(vec<T> a, vec<T> b) { return a > b ? a : b; }
template <class T> INLINE vec<T> square_root(vec<T> x) {  // one instruction: both compilers see through the loop
    T part[lanes<T>];
    std::memcpy(part, &x, sizeof x);
    for (T& y : part) y = std::sqrt(y);
    std::memcpy(&x, part, sizeof x);
    return x;
}

template <class T> INLINE T sum(vec<T> x) {  // pairwise: one fixed order
    T part[lanes<T>];
    std::memcpy(part, &x, sizeof x);
    for (int step = lanes<T> / 2; step; step /= 2)
        for (int i = 0; i < step; ++i) part[i] += part[i + step];
    return part[0];
}
template <class T> INLINE T largest(vec<T> x) {
    T part[lanes<T>];
    std::memcpy(part, &x, sizeof x);
    T best = part[0];
    for (int i = 1; i < lanes<T>; ++i) best = part[i] > best ? part[i] : best;
    return best;
}
