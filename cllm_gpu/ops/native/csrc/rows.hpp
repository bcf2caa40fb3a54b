// Passes over the rows of a matrix: layer norm, GELU, cross-entropy, column sums. The mathematics stands in
// ops/reference/*.py; here each is one pass over memory. Sums run in one fixed order.
#pragma once

#include "exponential.hpp"

#include <algorithm>
#include <cmath>

// ---- layer norm

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

// dx may be dresidual; dweight and dbias are added to.
template <class T> void layernorm_backward(
    index_t rows, index_t width, const T* dout, const T* x, const T* weight, const T* mean, const T* rstd,
    const T* dresidual, T* dx, T* dweight, T* dbias
) {
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
            correlation += g * hat;  // where hat is beyond the row, g is 0
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

// ---- GELU: ½·h·(1 + tanh u) = h·s with s = 1/(1 + e^(−2u)), as tanh u = 2s − 1

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

// d(h·s)/dh = s + h·s·(1 − s)·2u', with 2u' = 2·SCALE·(1 + 3·CUBIC·h²). dx may be dout; dbias is added to.
template <class T> void gelu_backward(index_t rows, index_t width, const T* dout, const T* x, T* dx, T* dbias) {
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

// ---- cross-entropy

template <class T> INLINE T row_maximum(index_t width, const T* x) {
    constexpr int n = lanes<T>;
    T best = x[0];
    index_t i = 0;
    if (width >= n) {
        vec<T> most = load(x);
        for (i = n; i + n <= width; i += n) most = maximum<T>(most, load(x + i));
        best = largest<T>(most);
    }
    for (; i < width; ++i) best = x[i] > best ? x[i] : best;
    return best;
}

// Σ e^(x − shift) of a row; with KEEP the exponentials replace x.
template <class T, bool KEEP> INLINE T exponential_sum(index_t width, T* x, T shift) {
    constexpr int n = lanes<T>;
    vec<T> total{};
    index_t i = 0;
    for (; i + n <= width; i += n) {
        vec<T> y = exponential<T>(load(x + i) - shift);
        total += y;
        if (KEEP) store(x + i, y);
    }
    T result = sum<T>(total);
    if (i < width) {
        vec<T> y = exponential<T>(load(x + i, width - i) - shift);
        if (KEEP) store(x + i, y, width - i);
        for (int j = 0; j < width - i; ++j) result += y[j];
    }
    return result;
}

// With `gradient` the logits become the gradient of gradient_scale·Σ losses. Returns false for a target that is
// neither ignored nor a column.
template <class T> bool cross_entropy(
    index_t rows, index_t width, T* logits, const std::int32_t* targets, T* losses, std::int32_t ignored,
    bool gradient, T gradient_scale
) {
    for (index_t r = 0; r < rows; ++r) {
        const std::int32_t target = targets[r];
        const bool counted = target != ignored;
        if (counted && (target < 0 || target >= width)) return false;
        T* x = logits + r * width;
        const T most = row_maximum(width, x), chosen = x[counted ? target : 0];
        const T total = gradient ? exponential_sum<T, true>(width, x, most) : exponential_sum<T, false>(width, x, most);
        losses[r] = counted ? std::log(total) - (chosen - most) : T(0);
        if (!gradient) continue;
        const T factor = counted ? gradient_scale / total : T(0);
        for (index_t i = 0; i < width; i += lanes<T>) store(x + i, load(x + i, width - i) * factor, width - i);
        if (counted) x[target] -= gradient_scale;
    }
    return true;
}

// ---- rows added up

template <class T> INLINE void add_to(index_t width, T* to, const T* x) {
    for (index_t i = 0; i < width; i += lanes<T>)
        store(to + i, load(to + i, width - i) + load(x + i, width - i), width - i);
}

template <class T> void column_sum(index_t rows, index_t width, const T* x, T* out) {
    for (index_t r = 0; r < rows; ++r) add_to(width, out, x + r * width);
}

template <class T> void copy_to_rows(index_t rows, index_t width, const T* x, T* out) {
    for (index_t r = 0; r < rows; ++r) std::memcpy(out + r * width, x, width * sizeof(T));
}
