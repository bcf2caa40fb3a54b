// Σ x² of a flat buffer, in float64 and in one fixed order (ops/reference/squared_norm.py).
#pragma once

#include "vector.hpp"

// Elements whose updates an optimizer step buffers until their squares are summed
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
