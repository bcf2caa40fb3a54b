// Dropout (ops/reference/dropout.py); the mask is generated as it is applied.
#pragma once

#include "philox.hpp"
#include "vector.hpp"

#include <algorithm>

// out[i] = x[i]·scale where word first + i is at least `threshold`, else x[i]·0; out may be x
template <class T> void dropout(
    index_t size, const T* x, T* out, std::uint64_t first, std::uint64_t seed, std::uint32_t stream0,
    std::uint32_t stream1, std::uint64_t threshold, T scale
) {
    const PhiloxKey key{std::uint32_t(seed), std::uint32_t(seed >> 32), stream0, stream1};
    std::uint32_t words[4 * LANES];
    for (index_t i = 0; i < size;) {
        const std::uint64_t element = first + std::uint64_t(i), block = element / 4;
        const index_t skip = index_t(element - 4 * block), count = std::min<index_t>(4 * LANES - skip, size - i);
        philox_blocks(block, key, words);
        for (index_t j = 0; j < count; ++j) out[i + j] = x[i + j] * (words[skip + j] >= threshold ? scale : T(0));
        i += count;
    }
}
