// GELU (formulas: ops/reference/gelu.py): ½·h·(1 + tanh u) = h·s with s = 1/(1 + e^(−2u)), as tanh u = 2s − 1
#pragma once

#include "column_sum.hpp"
#include "exponential.hpp"

constexpr double GELU_SCALE = 0.7978845608028654, GELU_CUBIC = 0.044715;

template <class T> INLINE vec<T> gelu_sigmoid(vec<T> h) {
    vec<T> minus_2u = h * (h * h * T(-2 * GELU_SCALE * GELU_CUBIC) + T(-2 * GELU_SCALE));
    return T(1) / (T(1) + exponential<T>(minus_2u));
}

template <class T> void gelu_forward(index_t rows, index_t width, T* x, const T* bias, T* out) {
    for (index_t r = 0; r < rows; ++r, x += width, out += width)
        for (index_t i = 0; i < width; i += lanes<T>) {
            const index_t left = width - i;
            vec<T> h = load(x + i, left);
            if (bias) {
                h += load(bias + i, left);
                store(x + i, h, left);
            }
            store(out + i, h * gelu_sigmoid<T>(h), left);
        }
}

// d(h·s)/dh = s + h·s·(1 − s)·2u', with 2u' = 2·SCALE·(1 + 3·CUBIC·h²). dx may be dout; dbias is added to where
// `accumulate` is not 0.
template <class T>
void gelu_backward(index_t rows, index_t width, const T* dout, const T* x, T* dx, T* dbias, int accumulate) {
    start_sum(width, dbias, accumulate);
    for (index_t r = 0; r < rows; ++r, dout += width, x += width, dx += width)
        for (index_t i = 0; i < width; i += lanes<T>) {
            const index_t left = width - i;
            vec<T> h = load(x + i, left), s = gelu_sigmoid<T>(h);
            vec<T> steepness = h * h * T(6 * GELU_SCALE * GELU_CUBIC) + T(2 * GELU_SCALE);
            vec<T> d = load(dout + i, left) * (s + h * steepness * (s - s * s));
            store(dx + i, d, left);
            if (dbias) store(dbias + i, load(dbias + i, left) + d, left);
        }
}
