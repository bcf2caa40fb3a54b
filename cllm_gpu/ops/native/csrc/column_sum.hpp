// Sums over the rows of a matrix in a fixed order, for parameter gradients; and a row copied to every row of a matrix.
#pragma once

#include "vector.hpp"

#include <algorithm>

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

// Zeros the gradients unless they accumulate; no effect if null
template <class T> void start_sum(index_t size, T* x, int accumulate) {
    if (x && !accumulate) std::fill_n(x, size, T(0));
}
