// The two element types every kernel is compiled for, and vector access to them.
//   real       activations and weights: float, or bf16 with -DCLLM_BF16
//   gradient   parameter gradients: like real, or float with -DCLLM_GRADIENT_FLOAT
// Arithmetic is always in fp32: load turns a real into a float exactly, store rounds once (to nearest, ties to even).
#pragma once
#include "common.cuh"

#ifdef CLLM_BF16
typedef bf16 real;
#define ENTRY(name) name##_bfloat16
#else
typedef float real;
#define ENTRY(name) name##_float32
#endif
#if defined(CLLM_BF16) && !defined(CLLM_GRADIENT_FLOAT)
typedef bf16 gradient;
#else
typedef float gradient;
#endif

typedef i64 index_t;

__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(bf16* p, float x) { *p = to_bf16(x); }

// Elements of T in the widest access (16 bytes).
template <class T>
constexpr int WIDE = 16 / sizeof(T);

// W neighbouring elements as floats: one 16-byte access when W is WIDE<T>, which needs that alignment; else W == 1.
template <int W>
struct Pack {
    float v[W];
};

template <int W, class T>
__device__ __forceinline__ Pack<W> load_pack(const T* p) {
    Pack<W> pack;
    if constexpr (W == 1) {
        pack.v[0] = to_float(*p);
    } else {
        static_assert(W * sizeof(T) == 16, "a wide access is 16 bytes");
        const uint4 memory = *reinterpret_cast<const uint4*>(p);
        const u32 words[4] = {memory.x, memory.y, memory.z, memory.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (sizeof(T) == 4) {
                pack.v[i] = float_of_bits(words[i]);
            } else {
                const float2 pair = unpack_bf16(words[i]);
                pack.v[2 * i] = pair.x;
                pack.v[2 * i + 1] = pair.y;
            }
        }
    }
    return pack;
}

template <int W, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<W>& pack) {
    if constexpr (W == 1) {
        store(p, pack.v[0]);
    } else {
        static_assert(W * sizeof(T) == 16, "a wide access is 16 bytes");
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (sizeof(T) == 4)
                words[i] = bits_of_float(pack.v[i]);
            else
                words[i] = pack_bf16(pack.v[2 * i], pack.v[2 * i + 1]);
        }
        *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// W neighbouring floats of a pack to fp32 memory, four at a time where W allows (p is then aligned to 16 bytes).
template <int W>
__device__ __forceinline__ void store_floats(float* p, const Pack<W>& pack) {
    if constexpr (W % 4 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 4)
            store4(p + i, make_float4(pack.v[i], pack.v[i + 1], pack.v[i + 2], pack.v[i + 3]));
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) p[i] = pack.v[i];
    }
}

// True when p may be accessed 16 bytes at a time (null counts as aligned).
__device__ __forceinline__ bool aligned16(const void* p) { return (reinterpret_cast<unsigned long long>(p) & 15) == 0; }

// Rows of `columns` elements of `real` from p on can all be accessed 16 bytes at a time.
__device__ __forceinline__ bool wide_rows(const void* p, int columns) {
    return aligned16(p) && columns % WIDE<real> == 0;
}

// x as it would be after a store and a load.
__device__ __forceinline__ float round_to_real(float x) {
#ifdef CLLM_BF16
    return to_float(to_bf16(x));
#else
    return x;
#endif
}
