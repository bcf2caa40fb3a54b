// Stands for CUDA's header of the same name, as far as kernels commonly use it.
#pragma once
#include "small_floats.hpp"

using __half = sim::SmallFloat<sim::HalfFormat>;
using __half2 = sim::SmallFloat2<__half>;
using half = __half;
using half2 = __half2;

SIM_SMALL_FLOAT_FUNCTIONS(__half, __half2)

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return make_float2(v.x, v.y); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline unsigned short __half_as_ushort(__half x) { return x.__x; }
inline __half __ushort_as_half(unsigned short bits) {
    __half x;
    x.__x = bits;
    return x;
}
