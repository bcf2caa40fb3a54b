// Philox4x32-10: the same words as ops/reference/philox.py, LANES counters at a time.
#pragma once

#include <cstdint>

constexpr int LANES = 16;

struct PhiloxKey {
    std::uint32_t key0, key1, stream0, stream1;
};

// words[4·i + j] = component j of Philox at counter (first + i low, first + i high, stream0, stream1)
inline void philox_blocks(std::uint64_t first, const PhiloxKey& key, std::uint32_t* words) {
    std::uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
    for (int i = 0; i < LANES; ++i) {
        c0[i] = std::uint32_t(first + i);
        c1[i] = std::uint32_t((first + i) >> 32);
        c2[i] = key.stream0;
        c3[i] = key.stream1;
    }
    std::uint32_t k0 = key.key0, k1 = key.key1;
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < LANES; ++i) {
            const std::uint64_t product0 = std::uint64_t(c0[i]) * 0xD2511F53u;
            const std::uint64_t product1 = std::uint64_t(c2[i]) * 0xCD9E8D57u;
            c0[i] = std::uint32_t(product1 >> 32) ^ c1[i] ^ k0;
            c2[i] = std::uint32_t(product0 >> 32) ^ c3[i] ^ k1;
            c1[i] = std::uint32_t(product1);
            c3[i] = std::uint32_t(product0);
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < LANES; ++i) {
        words[4 * i] = c0[i];
        words[4 * i + 1] = c1[i];
        words[4 * i + 2] = c2[i];
        words[4 * i + 3] = c3[i];
    }
}
