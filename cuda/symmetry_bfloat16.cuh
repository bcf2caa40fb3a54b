// The lattice's symmetry (symmetry.cuh) in the bf16 attention kernels: on tiles of queries and keys in shared memory,
// and on the accumulators of their gradients. Included after attention_tiles_bfloat16.cuh.
//
// Rows are turned where they lie and rounded once, by the warp that copied them: with head sizes of 2, 4, 8 or 16
// chunks no barrier is added. Where rows are cut otherwise, warps share them, and there is one.
#pragma once
#include "attention_tiles_bfloat16.cuh"

constexpr int TURNED = (PAIRS + 3) / 4;  // chunks of a row, the first ones, where the symmetry acts

// One chunk: four pairs.
__device__ __forceinline__ void turn_chunk(unsigned char* to, int chunk, const Symmetry::Element& element) {
    uint4* const place = reinterpret_cast<uint4*>(to);
    u32 words[4] = {place->x, place->y, place->z, place->w};
    float turns[8];
#pragma unroll
    for (int w = 0; w < 8; w += 4) {
        if (PAIRS % 4 != 0) break;
        const float4 two = load4(element.turns + 8 * chunk + w);
        turns[w] = two.x, turns[w + 1] = two.y, turns[w + 2] = two.z, turns[w + 3] = two.w;
    }
#pragma unroll
    for (int w = 0; w < 4; w++) {
        float2 pair = unpack_bf16(words[w]);
        if (PAIRS % 4 == 0)
            turn(pair.x, pair.y, turns[2 * w], turns[2 * w + 1], element.sign);
        else if (4 * chunk + w < PAIRS)
            turn(pair.x, pair.y, element, 4 * chunk + w);
        words[w] = pack_bf16(pair.x, pair.y);
    }
    *place = make_uint4(words[0], words[1], words[2], words[3]);
}

// Turns the rows of a tile, of positions `position` …, evenly shared by the threads. After the copies that the threads
// themselves started arrived, before the barrier that shows them to other warps.
template <int ROWS>
__device__ __forceinline__ void turn_rows(const Tile<ROWS>& tile, const Symmetry& symmetry, int position) {
    if constexpr (SYMMETRY) {
        // a warp turns the rows that it copied: of every STEP rows so many; if rows are cut otherwise, all take all
        constexpr bool BY_WARP = 32 % CHUNKS == 0 && ROWS * CHUNKS % THREADS == 0;
        constexpr int STEP = THREADS / CHUNKS, OF_STEP = BY_WARP ? 32 / CHUNKS : 1;
        constexpr int WORKERS = BY_WARP ? 32 : THREADS, COUNT = (BY_WARP ? ROWS / WARPS : ROWS) * TURNED;
        if (BY_WARP) __syncwarp(); else __syncthreads();
#pragma unroll 4
        for (int begin = 0; begin < COUNT; begin += WORKERS) {
            const int i = begin + threadIdx.x % WORKERS, n = i / TURNED;
            if (COUNT % WORKERS != 0 && i >= COUNT) continue;
            const int row = BY_WARP ? n / OF_STEP * STEP + threadIdx.x / 32 * OF_STEP + n % OF_STEP : n;
            turn_chunk(tile.at(row, i % TURNED), i % TURNED, symmetry.element(position + row));
        }
    }
}

// The same, once for a tile that stays: waits for all copies until now.
template <int ROWS>
__device__ __forceinline__ void turn_arrived(const Tile<ROWS>& tile, const Symmetry& symmetry, int position) {
    if (!SYMMETRY) return;
    copy_async_wait<0>();
    turn_rows(tile, symmetry, position);
}

// Gradients of rows that were turned to those of the rows as they are in memory: the warp's first is of position
// `position`; columns from tile `first_tile` on.
template <int M, int N>
__device__ __forceinline__ void turn_back(Accumulator<M, N>& acc, const Symmetry& symmetry, int position,
                                          int first_tile = 0) {
    if (!SYMMETRY) return;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Symmetry::Element element = symmetry.element(position + 16 * m + 8 * half + g);
#pragma unroll
            for (int n = 0; n < N; n++) {
                const int pair = 4 * (first_tile + n) + t;
                if (pair < PAIRS) turn_back(acc.v[m][n][2 * half], acc.v[m][n][2 * half + 1], element, pair);
            }
        }
    }
}
