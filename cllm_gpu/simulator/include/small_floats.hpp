// Two-byte floating-point types as storage with arithmetic in float, each operation rounded once.
#pragma once
#include <cstring>

#include "math.hpp"
#include "vector_types.hpp"

namespace sim {

struct Bfloat16Format {
    static unsigned short encode(float x) {  // to nearest, ties to even
        const unsigned bits = __float_as_uint(x);
        if (x != x) return 0x7fff;
        return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
    static float decode(unsigned short bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
};

struct HalfFormat {
    static unsigned short encode(float x) {  // to nearest, ties to even
        const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
        if (x != x) return 0x7fff;
        if (magnitude >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);  // 65520 and above
        if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 aligns the last kept bit with the float's last
            const float aligned = __uint_as_float(magnitude) + 0.5f;
            return static_cast<unsigned short>(sign | (__float_as_uint(aligned) - 0x3f000000u));
        }
        const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
        return static_cast<unsigned short>(sign | ((rounded >> 13) - (112u << 10)));
    }
    static float decode(unsigned short bits) {
        const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 0x3ffu;
        if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
        if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 5.9604644775390625e-8f;
        return __uint_as_float(sign | (exponent + 112u) << 23 | fraction << 13);
    }
};

template <class Format>
struct SmallFloat {
    unsigned short __x;
    SmallFloat() = default;
    SmallFloat(float x) : __x(Format::encode(x)) {}
    SmallFloat(double x) : SmallFloat(static_cast<float>(x)) {}
    SmallFloat(int x) : SmallFloat(static_cast<float>(x)) {}
    operator float() const { return Format::decode(__x); }
    SmallFloat& operator+=(SmallFloat y) { return *this = SmallFloat(float(*this) + float(y)); }
    SmallFloat& operator-=(SmallFloat y) { return *this = SmallFloat(float(*this) - float(y)); }
    SmallFloat& operator*=(SmallFloat y) { return *this = SmallFloat(float(*this) * float(y)); }
    SmallFloat& operator/=(SmallFloat y) { return *this = SmallFloat(float(*this) / float(y)); }
    friend SmallFloat operator+(SmallFloat x, SmallFloat y) { return SmallFloat(float(x) + float(y)); }
    friend SmallFloat operator-(SmallFloat x, SmallFloat y) { return SmallFloat(float(x) - float(y)); }
    friend SmallFloat operator*(SmallFloat x, SmallFloat y) { return SmallFloat(float(x) * float(y)); }
    friend SmallFloat operator/(SmallFloat x, SmallFloat y) { return SmallFloat(float(x) / float(y)); }
    friend SmallFloat operator-(SmallFloat x) { return SmallFloat(-float(x)); }
};

template <class T>
struct alignas(4) SmallFloat2 {
    T x, y;
};

}  // namespace sim

#define SIM_SMALL_FLOAT_FUNCTIONS(T, T2)                                                       \
    inline T __hadd(T x, T y) { return x + y; }                                                \
    inline T __hsub(T x, T y) { return x - y; }                                                \
    inline T __hmul(T x, T y) { return x * y; }                                                \
    inline T __hdiv(T x, T y) { return x / y; }                                                \
    inline T __hneg(T x) { return -x; }                                                        \
    inline T __hfma(T x, T y, T z) { return T(std::fma(float(x), float(y), float(z))); }       \
    inline T __hmax(T x, T y) { return T(std::fmax(float(x), float(y))); }                     \
    inline T __hmin(T x, T y) { return T(std::fmin(float(x), float(y))); }                     \
    inline bool __hisnan(T x) { return float(x) != float(x); }                                 \
    inline bool __hlt(T x, T y) { return float(x) < float(y); }                                \
    inline bool __hgt(T x, T y) { return float(x) > float(y); }                                \
    inline bool __heq(T x, T y) { return float(x) == float(y); }                               \
    inline T2 __hadd2(T2 x, T2 y) { return {x.x + y.x, x.y + y.y}; }                           \
    inline T2 __hmul2(T2 x, T2 y) { return {x.x * y.x, x.y * y.y}; }                           \
    inline T2 __hfma2(T2 x, T2 y, T2 z) { return {__hfma(x.x, y.x, z.x), __hfma(x.y, y.y, z.y)}; } \
    inline float __low2float(T2 x) { return x.x; }                                             \
    inline float __high2float(T2 x) { return x.y; }
