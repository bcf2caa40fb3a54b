// The lattice's symmetry on consecutive pairs (2m, 2m + 1) of head dimensions of queries and keys.
//
//   turn       (a, b) → (c·a − s·σb, s·a + c·σb)
//   turn_back  (a, b) → (c·a + s·b, σ(c·b − s·a)),  its transpose: of their gradients
//   c, s = turns[e][m] of the element e = token mod 24 at a position; σ = −1 for the reflections, e ≥ 12, else 1
//
// The first -DSYMMETRY_PAIRS=n pairs; 0, or not given: there is no symmetry, and no code for it. Cost of a pair: 4
// products and 2 sums, and 8 bytes of a table that stays in the caches; of a row of a tile: one token.
#pragma once
#include "storage.cuh"

#ifndef SYMMETRY_PAIRS
#define SYMMETRY_PAIRS 0
#endif

constexpr int PAIRS = SYMMETRY_PAIRS;
constexpr bool SYMMETRY = PAIRS != 0;
constexpr u32 ELEMENTS = 24, ROTATIONS = 12;

// What a kernel is given: tokens (B, S) and turns (24, PAIRS, 2), aligned to 16 bytes; null where there is no symmetry.
struct SymmetryInputs {
    const int* tokens;
    const float* turns;
    long long tokens_batch;
};

// The symmetry of one batch item.
class Symmetry {
  public:
    // One element's operation: its cosines and sines, and the bit that changes a float's sign if it is a reflection.
    struct Element {
        const float* turns;
        u32 sign;
    };

    __device__ __forceinline__ Symmetry(const SymmetryInputs& given, int positions, int b)
        : tokens(given.tokens + (SYMMETRY ? b * given.tokens_batch : 0)), turns(given.turns), last(positions - 1) {}

    // Of the token at a position; past the last one some element is as good as another.
    __device__ __forceinline__ Element element(int position) const {
        const u32 e = u32(tokens[position < last ? position : last]) % ELEMENTS;
        return {turns + e * (2 * PAIRS), e < ROTATIONS ? 0u : 0x80000000u};
    }

  private:
    const int* tokens;
    const float* turns;
    int last;
};

__device__ __forceinline__ void turn(float& a, float& b, float c, float s, u32 sign) {
    const float x = a, y = float_of_bits(bits_of_float(b) ^ sign);
    a = c * x - s * y;
    b = s * x + c * y;
}
// Pair m.
__device__ __forceinline__ void turn(float& a, float& b, const Symmetry::Element& e, int m) {
    turn(a, b, e.turns[2 * m], e.turns[2 * m + 1], e.sign);
}
__device__ __forceinline__ void turn_back(float& a, float& b, const Symmetry::Element& e, int m) {
    const float c = e.turns[2 * m], s = e.turns[2 * m + 1], x = a, y = b;
    a = c * x + s * y;
    b = float_of_bits(bits_of_float(c * y - s * x) ^ e.sign);
}
