// SGD with momentum on flat buffers (formulas: ops/reference/sgd.py).
#pragma once

#include "squared_norm.hpp"

#include <algorithm>

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

// Returns Σ update². numbers: learning rate, momentum, weight decay (first `decayed` elements only), gradient scale.
template <class T>
double sgd_step(index_t size, index_t decayed, T* p, const T* g, T* velocity, const double* numbers) {
    const double rate = numbers[0], momentum = numbers[1], scale = numbers[3];
    const double moved = sgd_segment(decayed, p, g, velocity, rate, momentum, numbers[2], scale);
    return moved + sgd_segment(
        size - decayed, p + decayed, g + decayed, velocity ? velocity + decayed : nullptr, rate, momentum, 0.0, scale
    );
}
