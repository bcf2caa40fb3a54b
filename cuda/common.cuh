// What every kernel of this project shares: bf16, vector loads, reductions in a fixed order, and the PTX instructions.
//
// Compiles under NVRTC without any other header (NVRTC has no <stdint.h>), for sm_80 and later, and under a C++
// compiler with cllm_gpu.simulator's header standing in for CUDA's built-ins (CLLM_SIMULATOR is then defined). Each PTX
// wrapper says what the instruction does in the words of the PTX ISA, and has a second body for the CPU.
// Rounding and order: every reduction here is a fixed tree, so a sum has the same bits at every run.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 FULL_WARP = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

#ifdef CLLM_SIMULATOR
#define INFINITY_F __builtin_inff()
#else
#define INFINITY_F __int_as_float(0x7f800000)
#endif

__device__ __forceinline__ float float_of_bits(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 bits_of_float(float x) { return __float_as_uint(x); }

// ---------------------------------------------------------------------------------------------------------- numbers

/// bfloat16: the upper 16 bits of a float. Only storage; arithmetic is done in float.
struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float to_float(bf16 x) { return float_of_bits(static_cast<u32>(x.bits) << 16); }
__device__ __forceinline__ float to_float(float x) { return x; }

/// PTX cvt.rn.bf16x2.f32 d, a, b: "converts a and b to bf16 and packs them: a in the upper half of d, b in the lower",
/// rounding to nearest even. Here `low` is element 0 in memory. NaN becomes 0x7fff, as on the device.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
#ifdef CLLM_SIMULATOR
    const float x[2] = {low, high};
    u32 half[2];
    for (int i = 0; i < 2; ++i) {
        const u32 b = bits_of_float(x[i]);
        half[i] = x[i] != x[i] ? 0x7fffu : (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
    }
    return half[0] | half[1] << 16;
#else
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
#endif
}

__device__ __forceinline__ bf16 to_bf16(float x) { return bf16{static_cast<u16>(pack_bf16(x, 0.0f))}; }

/// The two floats of a packed pair.
__device__ __forceinline__ float2 unpack_bf16(u32 pair) {
    return make_float2(float_of_bits(pair << 16), float_of_bits(pair & 0xffff0000u));
}

/// Storage conversions chosen by type, for kernels templated on float or bf16.
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return to_bf16(x); }

/// PTX ex2.approx.ftz.f32: "fast approximation of 2 raised to a power", absolute error 2^-22; ex2(-inf) = +0.
/// Subnormal results are flushed to zero.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef CLLM_SIMULATOR
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/// PTX sqrt.approx.ftz.f32: "fast approximation of the square root"; sqrt(+0) = +0 exactly.
__device__ __forceinline__ float sqrt_approx(float x) {
#ifdef CLLM_SIMULATOR
    return sqrtf(x);
#else
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/// PTX rcp.approx.ftz.f32: "fast approximation of the reciprocal".
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef CLLM_SIMULATOR
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/// PTX tanh.approx.f32: "fast approximation of the hyperbolic tangent", relative error 2^-11.
__device__ __forceinline__ float tanh_approx(float x) {
#ifdef CLLM_SIMULATOR
    return tanhf(x);
#else
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// ------------------------------------------------------------------------------------------------------- vector loads

/// Loads and stores of 16 bytes through the read path `ld.global`; the address must be a multiple of 16.
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ void store4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
__device__ __forceinline__ uint4 load8(const bf16* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ __forceinline__ void store8(bf16* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }

/// Four elements as floats, from float (16 bytes) or bf16 (8 bytes) storage.
__device__ __forceinline__ float4 load_float4(const float* p) { return load4(p); }
__device__ __forceinline__ float4 load_float4(const bf16* p) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    const float2 a = unpack_bf16(v.x), b = unpack_bf16(v.y);
    return make_float4(a.x, a.y, b.x, b.y);
}
__device__ __forceinline__ void store_float4(float* p, float4 v) { store4(p, v); }
__device__ __forceinline__ void store_float4(bf16* p, float4 v) {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}

// --------------------------------------------------------------------------------------------------------- reductions

/// Sum over the warp by a butterfly of shuffles; every lane gets it. All 32 lanes must call it.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

/// Maximum over the warp; every lane gets it. All 32 lanes must call it.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

/// Combines one value per warp over the block. `scratch` is shared memory of at least WARPS floats; it may be reused
/// right after the call, because the call ends in a barrier. All WARPS·32 threads must call it; each gets the result.
template <int WARPS>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += scratch[w];
    __syncthreads();
    return total;
}

/// As block_sum, for the maximum.
template <int WARPS>
__device__ __forceinline__ float block_max(float x, float* scratch) {
    x = warp_max(x);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    float largest = scratch[0];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) largest = fmaxf(largest, scratch[w]);
    __syncthreads();
    return largest;
}

// ------------------------------------------------------------------------------------------------- turns among blocks

/// One thread waits until `counter` holds `turn`, written by pass_turn of a block that is running already: a block that
/// waits for one not yet started may wait for ever. PTX ld.acquire.gpu: the loads that follow, and those of the block
/// after a barrier, see what the other block wrote before it passed the turn on, if they go past the L1 cache (__ldcg).
/// The simulator runs blocks one after another, so there a turn that has not come is an error.
__device__ __forceinline__ void wait_for_turn(const u32* counter, u32 turn) {
#ifdef CLLM_SIMULATOR
    sim::wait_for(counter, turn);
#else
    u32 now;
    while (true) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
        if (now == turn) break;
        __nanosleep(32);
    }
#endif
}

/// One thread, after a barrier behind the block's writes: they are there for every block that sees the new turn.
__device__ __forceinline__ void pass_turn(u32* counter, u32 turn) {
    __threadfence();
    atomicExch(counter, turn);
}

// ----------------------------------------------------------------------------------------------- asynchronous copies

/// PTX cvta.to.shared: the address of a shared variable within the shared window, as PTX instructions take it.
#ifndef CLLM_SIMULATOR
__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
#endif

/// PTX cp.async.cg.shared.global [dst], [src], 16, src-size: "initiates a non-blocking copy of 16 bytes from global to
/// shared memory, cached at L2 only; src-size bytes are copied and the remaining bytes of dst are filled with zeros".
/// Both addresses must be multiples of 16. With `valid` false src-size is 0: nothing is read and zeros are written.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
#ifdef CLLM_SIMULATOR
    sim::copy_async<16>(shared, global, valid ? 16 : 0);
#else
    const int source_bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
#endif
}

/// PTX cp.async.ca.shared.global of 4 bytes, cached at all levels; as copy_async_16 otherwise.
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool valid) {
#ifdef CLLM_SIMULATOR
    sim::copy_async<4>(shared, global, valid ? 4 : 0);
#else
    const int source_bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
#endif
}

/// PTX cp.async.commit_group: "commits all prior initiated but uncommitted cp.async operations into a cp.async-group"
/// of the executing thread.
__device__ __forceinline__ void copy_async_commit() {
#ifdef CLLM_SIMULATOR
    sim_copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// PTX cp.async.wait_group N: "waits until N or fewer of the most recent cp.async-groups are pending and all the prior
/// groups of the executing thread are complete". Other threads see the data only after a barrier that follows.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
#ifdef CLLM_SIMULATOR
    sim_copy_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ------------------------------------------------------------------------------------------------------- tensor cores

/// PTX ldmatrix.sync.aligned.m8n8.x4.shared.b16: "collectively loads four 8x8 matrices of 16-bit elements across all
/// threads of a warp". Lane 8·j + r passes the address of row r of matrix j (16 bytes, a multiple of 16). Register j of
/// lane l receives elements (row l/4, columns 2·(l%4) and +1) of matrix j, the lower column in the lower half.
__device__ __forceinline__ void load_matrix_x4(u32 (&fragment)[4], const void* row) {
#ifdef CLLM_SIMULATOR
    sim::load_matrix<4, false>(fragment, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

/// As load_matrix_x4 with .trans: "the matrices are loaded in column-major format": register j of lane l receives
/// elements (rows 2·(l%4) and +1, column l/4) of matrix j.
__device__ __forceinline__ void load_matrix_x4_trans(u32 (&fragment)[4], const void* row) {
#ifdef CLLM_SIMULATOR
    sim::load_matrix<4, true>(fragment, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

/// PTX mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: "performs D = A·B + C on a 16x16 A (row-major), a 16x8 B
/// (column-major) and 16x8 C and D in float32", here with C = D. With g = lane/4 and t = lane%4 a lane holds
///   a[0], a[1], a[2], a[3]: A at (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8), each with the next column;
///   b[0], b[1]:             B at (2t, g), (2t+8, g), each with the next row;
///   d[0], d[1], d[2], d[3]: D at (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#ifdef CLLM_SIMULATOR
    const u32 b[2] = {b0, b1};
    sim::mma_bf16(d, a, b, d);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
