// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"), drawing the same
// words as cllm_gpu/ops/reference/philox.py: word i is component i mod 4 at counter (i / 4, step, site), key = seed.
// The step is read from the device's memory: a captured launch is replayed with the pointers it had, at every step.
#pragma once

__device__ __forceinline__ void philox4x32(unsigned (&c)[4], unsigned k0, unsigned k1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned long long p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
        c[0] = unsigned(p1 >> 32) ^ c[1] ^ k0;
        c[2] = unsigned(p0 >> 32) ^ c[3] ^ k1;
        c[1] = unsigned(p1);
        c[3] = unsigned(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// The words of one stream; four neighbours that begin at a multiple of four cost one evaluation.
struct PhiloxWords {
    unsigned long long seed, block = ~0ull;
    unsigned step, site;
    unsigned words[4];

    __device__ PhiloxWords(unsigned long long seed, const unsigned* draw, unsigned site)
        : seed(seed), step(draw[0]), site(site) {}

    // Words 4·block … 4·block + 3.
    __device__ __forceinline__ void draw(unsigned long long wanted) {
        block = wanted;
        words[0] = unsigned(block);
        words[1] = unsigned(block >> 32);
        words[2] = step;
        words[3] = site;
        philox4x32(words, unsigned(seed), unsigned(seed >> 32));
    }

    __device__ __forceinline__ unsigned at(unsigned long long index) {
        if (index / 4 != block) draw(index / 4);
        const unsigned lane = index % 4;  // chosen without indexing, so that the words stay in registers
        return lane < 2 ? (lane == 0 ? words[0] : words[1]) : (lane == 2 ? words[2] : words[3]);
    }
};
