// Token and position embeddings (formulas: ops/reference/embedding.py).
#pragma once

#include "column_sum.hpp"

// Returns false if a token is outside the table.
template <class T> bool embedding_forward(
    index_t batch, index_t length, index_t width, index_t vocabulary, const std::int32_t* tokens, const T* table,
    const T* positions, T* out
) {
    for (index_t b = 0; b < batch; ++b)
        for (index_t t = 0; t < length; ++t, out += width) {
            const index_t token = tokens[b * length + t];
            if (token < 0 || token >= vocabulary) return false;
            std::memcpy(out, table + token * width, width * sizeof(T));
            if (positions) add_to(width, out, positions + t * width);
        }
    return true;
}

// Adds to dtable and dpositions.
template <class T> bool embedding_backward(
    index_t batch, index_t length, index_t width, index_t vocabulary, const T* dout, const std::int32_t* tokens,
    T* dtable, T* dpositions
) {
    for (index_t b = 0; b < batch; ++b)
        for (index_t t = 0; t < length; ++t, dout += width) {
            const index_t token = tokens[b * length + t];
            if (token < 0 || token >= vocabulary) return false;
            add_to(width, dtable + token * width, dout);
            if (dpositions) add_to(width, dpositions + t * width, dout);
        }
    return true;
}
