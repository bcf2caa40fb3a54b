// What the fused attention backward of both storage types shares: whose turn it is to add to dQ.
#pragma once
#include "attention.cuh"

// A tile of queries of one (batch item, query head), as one tile of keys sees it.
struct Turn {
    u32* counter;
    int place;   // how many tiles of keys add before this one
    bool final;  // none adds after it

    __device__ __forceinline__ Turn(u32* counter, const Sizes& n, int last_query, int tile, int tile_keys)
        : counter(counter), final(tile == 0) {
        const int last = last_query < n.queries ? last_query : n.queries - 1;
        place = (n.visible(last) + tile_keys - 1) / tile_keys - 1 - tile;
    }
    // Every thread of the block: returns when it is the block's turn. Ends in a barrier.
    __device__ __forceinline__ void wait() const {
        if (threadIdx.x == 0) wait_for_turn(counter, place);
        __syncthreads();
    }
    // Every thread of the block, when it has written. Begins with a barrier.
    __device__ __forceinline__ void pass() const {
        __syncthreads();
        if (threadIdx.x == 0) pass_turn(counter, final ? 0 : place + 1);
    }
};
