// Layer norm, alone and with the residual addition (formulas: ops/reference/layernorm.py): one pass over each row.
#pragma once

#include "column_sum.hpp"

#include <cmath>

template <class T> INLINE void normalise_row(
    index_t width, const T* x, const T* weight, const T* bias, T* out, T* mean, T* rstd, T epsilon
) {
    constexpr int n = lanes<T>;
    vec<T> total{}, squares{};
    for (index_t i = 0; i < width; i += n) total += load(x + i, width - i);
    const T centre = sum<T>(total) / T(width);
    for (index_t i = 0; i + n <= width; i += n) {
        vec<T> d = load(x + i) - centre;
        squares += d * d;
    }
    T rest = 0;
    for (index_t i = width / n * n; i < width; ++i) rest += (x[i] - centre) * (x[i] - centre);
    const T inverse = T(1) / std::sqrt((sum<T>(squares) + rest) / T(width) + epsilon);
    for (index_t i = 0; i < width; i += n) {
        vec<T> y = (load(x + i, width - i) - centre) * inverse * load(weight + i, width - i);
        if (bias) y += load(bias + i, width - i);
        store(out + i, y, width - i);
    }
    *mean = centre;
    *rstd = inverse;
}

template <class T> void layernorm_forward(
    index_t rows, index_t width, const T* x, const T* weight, const T* bias, T* out, T* mean, T* rstd, T epsilon
) {
    for (index_t r = 0; r < rows; ++r)
        normalise_row(width, x + r * width, weight, bias, out + r * width, mean + r, rstd + r, epsilon);
}

template <class T> void residual_layernorm_forward(
    index_t rows, index_t width, const T* residual, const T* branch, const T* weight, const T* bias, T* residual_out,
    T* out, T* mean, T* rstd, T epsilon
) {
    for (index_t r = 0; r < rows; ++r) {
        const T *x = residual + r * width, *b = branch + r * width;
        T* stream = residual_out + r * width;
        for (index_t i = 0; i < width; i += lanes<T>)
            store(stream + i, load(x + i, width - i) + load(b + i, width - i), width - i);
        normalise_row(width, stream, weight, bias, out + r * width, mean + r, rstd + r, epsilon);
    }
}

// dx may be dresidual; dweight and dbias are added to where `accumulate` is not 0.
template <class T> void layernorm_backward(
    index_t rows, index_t width, const T* dout, const T* x, const T* weight, const T* mean, const T* rstd,
    const T* dresidual, T* dx, T* dweight, T* dbias, int accumulate
) {
    start_sum(width, dweight, accumulate);
    start_sum(width, dbias, accumulate);
    constexpr int n = lanes<T>;
    for (index_t r = 0; r < rows; ++r, dout += width, x += width, dx += width) {
        const T centre = mean[r], inverse = rstd[r];
        vec<T> total{}, correlation{};
        for (index_t i = 0; i < width; i += n) {
            const index_t left = width - i;
            vec<T> d = load(dout + i, left), hat = (load(x + i, left) - centre) * inverse;
            vec<T> g = d * load(weight + i, left);
            store(dweight + i, load(dweight + i, left) + d * hat, left);
            if (dbias) store(dbias + i, load(dbias + i, left) + d, left);
            total += g;
            correlation += g * hat;  // g is 0 for lanes past the end of the row
        }
        const T g_mean = sum<T>(total) / T(width), g_correlation = sum<T>(correlation) / T(width);
        for (index_t i = 0; i < width; i += n) {
            const index_t left = width - i;
            vec<T> g = load(dout + i, left) * load(weight + i, left);
            vec<T> hat = (load(x + i, left) - centre) * inverse;
            vec<T> slope = (g - g_mean - hat * g_correlation) * inverse;
            store(dx + i, dresidual ? load(dresidual + i, left) + slope : slope, left);
        }
        if (dresidual) dresidual += width;
    }
}
