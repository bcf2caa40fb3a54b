// The lattice's additive terms of the attention scores, computed for the pairs that a thread holds from a few words of
// each token. Never stored: the backward computes them again.
//
//   term(i, j) = −α·‖c_i − c_j‖ − β·|z_i − z_j| + γ·[t_i = t_j] + Σ_{n ≤ ℓ(i, j)} μ_n
//   ℓ(i, j): how many of the tokens t_i, t_{i−1}, … equal t_{j−1}, t_{j−2}, …, at most MATCHES, all in the sequence
//
// c = (x, y, z) is the lattice point of a position's token t; α, β, γ, μ are the head's scalars. Which terms there are
// is chosen when compiling, and the others cost nothing: -DTERM_DISTANCE, -DTERM_PRIME_DISTANCE, -DTERM_SAME_TOKEN: 0
// or 1; -DTERM_MATCHES: 0 … 8; -DTERM_POINT_GRADIENTS: 1 where the backward wants those of the points, too.
// Cost per pair: a term of one comparison is a comparison and an addition. Matches: orders are tried one after the
// other for four pairs of a thread, as long as one of its warp's 128 pairs still matches; an order takes three loads,
// with addresses that are known when compiling, four comparisons, four additions, and a vote. A distance takes 6
// FMA-pipe instructions and one square root; |z_i − z_j| takes two.
#pragma once
#include "storage.cuh"

#ifndef TERM_DISTANCE
#define TERM_DISTANCE 0
#endif
#ifndef TERM_PRIME_DISTANCE
#define TERM_PRIME_DISTANCE 0
#endif
#ifndef TERM_SAME_TOKEN
#define TERM_SAME_TOKEN 0
#endif
#ifndef TERM_MATCHES
#define TERM_MATCHES 0
#endif
#ifndef TERM_POINT_GRADIENTS
#define TERM_POINT_GRADIENTS 0
#endif

constexpr bool DISTANCE = TERM_DISTANCE, PRIME_DISTANCE = TERM_PRIME_DISTANCE, SAME_TOKEN = TERM_SAME_TOKEN;
constexpr bool POINTS = DISTANCE || PRIME_DISTANCE, POINT_GRADIENTS = TERM_POINT_GRADIENTS;
constexpr int MATCHES = TERM_MATCHES;
// The order of a head's scalars.
constexpr int AT_PRIME_DISTANCE = DISTANCE, AT_SAME_TOKEN = AT_PRIME_DISTANCE + PRIME_DISTANCE;
constexpr int AT_MATCHES = AT_SAME_TOKEN + SAME_TOKEN, TERM_COUNT = AT_MATCHES + MATCHES;
constexpr bool SCORE_TERMS = TERM_COUNT > 0;
// Around the tokens of a sequence stands what matches nothing, so that no comparison asks where the sequence ends:
// before them as much as the longest match looks back, after them up to the end of the last tile.
constexpr int PAD_BEFORE = 8, PAD_AFTER = 127, NO_QUERY = -1, NO_KEY = -2;

__device__ constexpr int at_least_one(int count) { return count > 0 ? count : 1; }

// What a kernel is given; null where no term wants it. padded (B, 2, padded_length): the tokens, NO_QUERY around them,
// and the tokens, NO_KEY around them; points (B, S, 3); scalars (H, TERM_COUNT).
struct TermInputs {
    const int* padded;
    const float* points;
    const real* scalars;
    long long padded_length, points_batch;
};

// p, which the compiler is not to compute again at every use: 64-bit addresses from their parts are many instructions.
template <class T>
__device__ __forceinline__ const T* known_address(const T* p) {
#ifndef CLLM_SIMULATOR
    asm volatile("" : "+l"(p));
#endif
    return p;
}

// The score terms of one (batch item, query head).
class ScoreTerms {
  public:
    // One position: its token, and its lattice point.
    struct Token {
        const int* id = nullptr;
        float x = 0.0f, y = 0.0f, z = 0.0f;
    };

    // offset: the position of the first query. unit: what the scores that terms are added to will be multiplied by.
    __device__ __forceinline__ ScoreTerms(const TermInputs& given, int offset, int positions, float unit, int b, int h)
        : offset(offset), positions(positions) {
        if (SAME_TOKEN || MATCHES) {
            queries = given.padded + 2 * b * given.padded_length + PAD_BEFORE;
            keys = queries + given.padded_length;
            queries += offset;
        }
        if (POINTS) points = known_address(given.points + b * given.points_batch);
#pragma unroll
        for (int i = 0; i < TERM_COUNT; i++) scalars[i] = to_float(given.scalars[h * TERM_COUNT + i]) / unit;
    }

    // Past the last query or key some token is as good as another: those scores are masked.
    __device__ __forceinline__ Token query(int t) const { return position(queries + t, t + offset); }
    __device__ __forceinline__ Token key(int j) const { return position(keys + j, j); }

    // x[i][j] += the terms of query a[i] and key b[j]. Every lane of the warp.
    template <int Q, int K>
    __device__ __forceinline__ void add_to(float (&x)[Q][K], const Token (&a)[Q], const Token (&b)[K]) const {
#pragma unroll
        for (int i = 0; i < Q; i++) {
#pragma unroll
            for (int j = 0; j < K; j++) {
                if (DISTANCE) x[i][j] -= scalars[0] * distance(a[i], b[j]);
                if (PRIME_DISTANCE) x[i][j] -= scalars[AT_PRIME_DISTANCE] * fabsf(a[i].z - b[j].z);
                if (SAME_TOKEN && *a[i].id == *b[j].id) x[i][j] += scalars[AT_SAME_TOKEN];
            }
        }
        for_matches(a, b, [&](int n, int i, int j) { x[i][j] += scalars[AT_MATCHES + n]; });
    }

    // What the gradients dx of those scores give the scalars. Every lane of the warp.
    template <int Q, int K>
    __device__ __forceinline__ void add_gradients(const float (&dx)[Q][K], const Token (&a)[Q], const Token (&b)[K]) {
#pragma unroll
        for (int i = 0; i < Q; i++) {
#pragma unroll
            for (int j = 0; j < K; j++) {
                if (DISTANCE) gradients[0] -= dx[i][j] * distance(a[i], b[j]);
                if (PRIME_DISTANCE) gradients[AT_PRIME_DISTANCE] -= dx[i][j] * fabsf(a[i].z - b[j].z);
                if (SAME_TOKEN && *a[i].id == *b[j].id) gradients[AT_SAME_TOKEN] += dx[i][j];
            }
        }
        for_matches(a, b, [&](int n, int i, int j) { gradients[AT_MATCHES + n] += dx[i][j]; });
    }

    // sums += dx·∂term/∂(c_i − c_j), over the unit; where two points are equal, 0.
    __device__ __forceinline__ void add_slope(float (&sums)[3], float dx, const Token& a, const Token& b) const {
        if (DISTANCE) {
            const float length = distance(a, b), by_length = length > 0.0f ? -dx * scalars[0] / length : 0.0f;
            sums[0] += by_length * (a.x - b.x);
            sums[1] += by_length * (a.y - b.y);
            sums[2] += by_length * (a.z - b.z);
        }
        if (PRIME_DISTANCE && a.z != b.z)
            sums[2] += a.z > b.z ? -dx * scalars[AT_PRIME_DISTANCE] : dx * scalars[AT_PRIME_DISTANCE];
    }

    // The scalars' gradients, summed over the block in a fixed order, to partials[index]. `exchange`: TERM_COUNT floats
    // per warp of shared memory. Every thread of the block.
    __device__ __forceinline__ void finish(float* partials, i64 index, float* exchange) const {
        if (!SCORE_TERMS) return;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TERM_COUNT; i++) {
            const float sum = warp_sum(gradients[i]);
            if (threadIdx.x % 32 == 0) exchange[threadIdx.x / 32 * TERM_COUNT + i] = sum;
        }
        __syncthreads();
        if (threadIdx.x >= TERM_COUNT) return;
        float total = 0.0f;
        for (int warp = 0; warp < blockDim.x / 32; warp++) total += exchange[warp * TERM_COUNT + threadIdx.x];
        partials[index * TERM_COUNT + threadIdx.x] = total;
    }

  private:
    // Padded tokens of this batch item: the first query's, the first key's.
    const int *queries = nullptr, *keys = nullptr;
    const float* points = nullptr;  // (S, 3)
    int offset, positions;
    float scalars[at_least_one(TERM_COUNT)] = {}, gradients[at_least_one(TERM_COUNT)] = {};

    __device__ __forceinline__ Token position(const int* id, int s) const {
        Token token;
        token.id = id;
        if (POINTS) {
            const float* const point = points + 3 * i64(s < positions ? s : positions - 1);
            if (DISTANCE) token.x = point[0], token.y = point[1];
            token.z = point[2];
        }
        return token;
    }
    __device__ __forceinline__ static float distance(const Token& a, const Token& b) {
        const float x = a.x - b.x, y = a.y - b.y, z = a.z - b.z;
        return sqrt_approx(x * x + y * y + z * z);
    }
    // Calls take(n, i, j) for every pair of a[i] and b[j] in which n + 1 tokens match, n = 0 … MATCHES − 1.
    template <int Q, int K, class F>
    __device__ __forceinline__ void for_matches(const Token (&a)[Q], const Token (&b)[K], F take) const {
        bool matching[Q][K];
#pragma unroll
        for (int n = 0; n < MATCHES; n++) {
            int of_a[Q], of_b[K];
#pragma unroll
            for (int i = 0; i < Q; i++) of_a[i] = a[i].id[-n];
#pragma unroll
            for (int j = 0; j < K; j++) of_b[j] = b[j].id[-1 - n];
            bool any = false;
#pragma unroll
            for (int i = 0; i < Q; i++) {
#pragma unroll
                for (int j = 0; j < K; j++) {
                    matching[i][j] = of_a[i] == of_b[j] && (n == 0 || matching[i][j]);
                    any = any || matching[i][j];
                }
            }
            if (n + 1 < MATCHES && !__any_sync(FULL_WARP, any)) return;
#pragma unroll
            for (int i = 0; i < Q; i++)
#pragma unroll
                for (int j = 0; j < K; j++)
                    if (matching[i][j]) take(n, i, j);
        }
    }
};
