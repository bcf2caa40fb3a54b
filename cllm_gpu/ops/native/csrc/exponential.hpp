// e^x of a vector. x = n·ln 2 + r with |r| ≤ ½·ln 2 (ln 2 in two parts, Cody & Waite 1980), e^r by its Taylor series,
// 2^n from the exponent bits. Within 2 ulp where the result is a normal number; 0 below the logarithm of the smallest
// normal number, +inf above that of the largest; NaN for NaN.
#pragma once

#include "vector.hpp"

template <class T> struct exponential_constants;
template <> struct exponential_constants<float> {
    static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float lowest = -87.33654f, highest = 88.72283f;
    static constexpr float round = 12582912.0f;  // 1.5·2^23: adding it leaves the nearest integer in the low bits
    static constexpr int mantissa = 23, terms = 7;
};
template <> struct exponential_constants<double> {
    static constexpr double log2e = 1.4426950408889634, ln2_high = 6.93147180369123816490e-01;
    static constexpr double ln2_low = 1.90821492927058770002e-10;
    static constexpr double lowest = -708.3964185322641, highest = 709.782712893384;
    static constexpr double round = 6755399441055744.0;  // 1.5·2^52
    static constexpr int mantissa = 52, terms = 13;
};

constexpr double inverse_factorial(int n) { return n < 2 ? 1.0 : inverse_factorial(n - 1) / n; }

template <class T> INLINE vec<T> exponential(vec<T> x) {
    using constant = exponential_constants<T>;
    vec<T> shifted = x * constant::log2e + constant::round;
    vec<T> n = shifted - constant::round;
    vec<T> r = x - n * constant::ln2_high;
    r = r - n * constant::ln2_low;
    vec<T> y = splat(T(inverse_factorial(constant::terms)));
#pragma GCC unroll 16
    for (int i = constant::terms - 1; i >= 0; --i) y = y * r + T(inverse_factorial(i));
    // adding n to the exponent's bits multiplies by 2^n; n in the low bits of `shifted` survives the shift
    ivec<T> bits = (ivec<T>)y + ((ivec<T>)shifted << constant::mantissa);
    vec<T> scaled = (vec<T>)bits;
    scaled = select<T>(x < constant::lowest, vec<T>{}, scaled);
    scaled = select<T>(x > constant::highest, splat(T(__builtin_inf())), scaled);
    return select<T>(x == x, scaled, x);
}

// Of an array, for tests.
template <class T> void exponentials(index_t size, const T* x, T* out) {
    for (index_t i = 0; i < size; i += lanes<T>) store(out + i, exponential<T>(load(x + i, size - i)), size - i);
}
