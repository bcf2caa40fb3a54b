// Inverted dropout inside other kernels: the mask is drawn from Philox by element index and never stored.
//
//   y = x·keep·scale,  keep = word(first_element + i) >= threshold
//   threshold = round(rate·2³²),  scale = 1 / (1 − rate)
//
// The backward is the same map. Four neighbouring elements share one evaluation of 10 rounds.
// Deterministic: the same bits as the reference for float. Source: Srivastava et al. 2014; Salmon et al. 2011.
#pragma once
#include "philox.cuh"
#include "storage.cuh"

// `threshold` 0 keeps everything and reads no step.
struct Mask {
    unsigned long long first_element, seed;
    const unsigned* step;
    unsigned site, threshold;
    float scale;

    // pack ∘ mask·scale, rounded to real, for elements `index` … of the array
    template <int W>
    __device__ __forceinline__ void apply(Pack<W>& pack, index_t index) const {
        if (threshold == 0) return;
        PhiloxWords words(seed, step, site);
        const u64 begin = first_element + index;
        unsigned kept = 0;  // bit i: element i is kept
        // not unrolled, so that the rounds are there once; a pack that begins inside a block meets one block more
#pragma unroll 1
        for (u64 block = begin / 4; 4 * block < begin + W; block++) {
            words.draw(block);
#pragma unroll
            for (int lane = 0; lane < 4; lane++) {
                const u64 i = 4 * block + lane - begin;  // wraps to a large number before the pack
                if (i < W && words.words[lane] >= threshold) kept |= 1u << i;
            }
        }
#pragma unroll
        for (int i = 0; i < W; i++)
            pack.v[i] = round_to_real(__fmul_rn(pack.v[i], kept >> i & 1 ? scale : 0.0f));
    }
};
