// Adam and AdamW on flat buffers (formulas: ops/reference/adam.py).
#pragma once

#include "squared_norm.hpp"

#include <algorithm>
#include <cmath>

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

// Returns Σ update². numbers: the fields of AdamSettings in order. The first `decayed` elements get weight decay.
template <class T>
double adam_step(index_t size, index_t decayed, T* p, const T* g, T* m, T* v, const double* numbers, int decoupled) {
    const AdamSettings s{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
                         numbers[5], numbers[6], numbers[7], decoupled};
    const double moved = adam_segment(decayed, p, g, m, v, s, s.weight_decay);
    return moved + adam_segment(size - decayed, p + decayed, g + decayed, m + decayed, v + decayed, s, 0.0);
}
