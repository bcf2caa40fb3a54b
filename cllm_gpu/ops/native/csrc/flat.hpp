// Passes over flat buffers: Adam, SGD, the norm (formulas: ops/reference/adam.py, sgd.py, squared_norm.py), sums of
// buffers. Squares are summed in float64 in one fixed order.
#pragma once

#include "vector.hpp"

#include <algorithm>
#include <cmath>

constexpr index_t PIECE = 1024;

template <class T> inline double squared_norm(index_t size, const T* x) {
    double part[16] = {};
    index_t i = 0;
    for (; i + 16 <= size; i += 16)
        for (int j = 0; j < 16; ++j) part[j] += double(x[i + j]) * double(x[i + j]);
    for (; i < size; ++i) part[i % 16] += double(x[i]) * double(x[i]);
    double total = 0;
    for (double p : part) total += p;
    return total;
}

struct AdamSettings {
    double rate, beta1, beta2, epsilon, correction1, correction2, weight_decay, gradient_scale;
    int decoupled;
};

template <class T>
double adam_segment(index_t size, T* p, const T* g, T* m, T* v, const AdamSettings& s, double weight_decay) {
    const T scale = T(s.gradient_scale), beta1 = T(s.beta1), beta2 = T(s.beta2), epsilon = T(s.epsilon);
    const T rest1 = T(1 - s.beta1), rest2 = T(1 - s.beta2), inverse2 = T(1 / s.correction2);
    const T step = T(s.rate / s.correction1), coupled = s.decoupled ? T(0) : T(weight_decay);
    const T shrink = s.decoupled ? T(s.rate * weight_decay) : T(0);
    double moved = 0;
    T update[PIECE];
    for (index_t start = 0; start < size; start += PIECE, p += PIECE, g += PIECE, m += PIECE, v += PIECE) {
        const index_t count = std::min(PIECE, size - start);
        for (index_t i = 0; i < count; ++i) {
            const T gradient = g[i] * scale + coupled * p[i];
            m[i] = m[i] * beta1 + rest1 * gradient;
            v[i] = v[i] * beta2 + rest2 * (gradient * gradient);
            update[i] = m[i] / (std::sqrt(v[i] * inverse2) + epsilon) * step + shrink * p[i];
            p[i] -= update[i];
        }
        moved += squared_norm(count, update);
    }
    return moved;
}

template <class T>
double sgd_segment(
    index_t size, T* p, const T* g, T* velocity, double rate, double momentum, double weight_decay, double scale
) {
    double moved = 0;
    T update[PIECE];
    for (index_t start = 0; start < size; start += PIECE, p += PIECE, g += PIECE) {
        const index_t count = std::min(PIECE, size - start);
        for (index_t i = 0; i < count; ++i) {
            T change = g[i] * T(scale);
            if (weight_decay != 0) change += T(weight_decay) * p[i];
            if (velocity) change = velocity[start + i] = velocity[start + i] * T(momentum) + change;
            update[i] = change * T(rate);
            p[i] -= update[i];
        }
        moved += squared_norm(count, update);
    }
    return moved;
}

