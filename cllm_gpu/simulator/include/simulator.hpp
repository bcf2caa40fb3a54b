// Included before every simulated kernel source: what CUDA's compiler would provide by itself.
// Part of cllm_gpu.simulator; the definitions behind the declarations are in ../runtime.
#pragma once

#include <cstddef>
#ifdef _GLIBCXX_USE_STD_SPEC_FUNCS  // the special functions of C++17 make <cmath> six times as long to read
#undef _GLIBCXX_USE_STD_SPEC_FUNCS
#define _GLIBCXX_USE_STD_SPEC_FUNCS 0
#endif
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>  // clock()
#include <limits>
#include <type_traits>
#include <utility>

#define CLLM_SIMULATOR 1

// __global__, __shared__ and the words below stay in the preprocessed text: cllm_gpu.simulator.source rewrites them.
// __device__ __constant__ __managed__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __inline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __builtin_align__(n) alignas(n)
#define CUDART_INF_F (__builtin_inff())
#define CUDART_NAN_F (__builtin_nanf(""))

#include "runtime_api.hpp"
#include "vector_types.hpp"
#include "warp.hpp"
#include "atomics.hpp"
#include "math.hpp"
#include "tensor_core.hpp"
#include "kernel_table.hpp"

extern const uint3 threadIdx;
extern const uint3 blockIdx;
extern const dim3 blockDim;
extern const dim3 gridDim;
constexpr int warpSize = 32;
