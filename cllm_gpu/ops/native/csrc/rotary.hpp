// Rotary position embedding (formulas: ops/reference/rotary.py).
#pragma once

#include "vector.hpp"

// x(b, t, h, d) = x[b·item + t·row + h·head + d]; `direction` 1 rotates by the angle, −1 back
template <class T> void rotary(
    index_t batch, index_t length, index_t heads, index_t half, T* x, index_t item, index_t row, index_t head,
    const T* cosine, const T* sine, T direction
) {
    for (index_t b = 0; b < batch; ++b)
        for (index_t t = 0; t < length; ++t)
            for (index_t h = 0; h < heads; ++h) {
                T *first = x + b * item + t * row + h * head, *second = first + half;
                const T *c = cosine + t * half, *s = sine + t * half;
                for (index_t i = 0; i < half; i += lanes<T>) {
                    const index_t left = half - i;
                    const vec<T> a = load(first + i, left), z = load(second + i, left);
                    const vec<T> cos = load(c + i, left), sin = load(s + i, left) * direction;
                    store(first + i, a * cos - z * sin, left);
                    store(second + i, z * cos + a * sin, left);
                }
            }
}
