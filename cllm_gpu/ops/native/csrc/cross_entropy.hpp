// Softmax cross-entropy and its gradient (formulas: ops/reference/cross_entropy.py): a pass over each row for the
// maximum, one for the sum, one for the gradient.
#pragma once

#include "exponential.hpp"
#include "status.hpp"

#include <cmath>

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

// Σ e^(x − shift) of a row; with KEEP, x is replaced by the exponentials.
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

// With `gradient` the logits become the gradient of gradient_scale·Σ losses. BAD_INDEX for a target that is
// neither ignored nor a column.
template <class T> int cross_entropy(
    index_t rows, index_t width, T* logits, const std::int32_t* targets, T* losses, std::int32_t ignored,
    int gradient, T gradient_scale
) {
    for (index_t r = 0; r < rows; ++r) {
        const std::int32_t target = targets[r];
        const bool counted = target != ignored;
        if (counted && (target < 0 || target >= width)) return BAD_INDEX;
        T* x = logits + r * width;
        const T most = row_maximum(width, x), chosen = x[counted ? target : 0];
        const T total = gradient ? exponential_sum<T, true>(width, x, most) : exponential_sum<T, false>(width, x, most);
        losses[r] = counted ? std::log(total) - (chosen - most) : T(0);
        if (!gradient) continue;
        const T factor = counted ? gradient_scale / total : T(0);
        for (index_t i = 0; i < width; i += lanes<T>) store(x + i, load(x + i, width - i) * factor, width - i);
        if (counted) x[target] -= gradient_scale;
    }
    return DONE;
}
