// Matrix product C (m, n) = A (m, k) · B (k, n) (+ C) (+ a bias per column), one thread.
//
// The scheme of Goto & van de Geijn 2008 ("Anatomy of high-performance matrix multiplication"): B is packed in panels
// of NR columns and A in panels of MR rows, a block of each at a time, so that the micro-kernel reads both in order;
// it keeps an MR × NR tile of C in registers. Packing also transposes, so any of the four layouts costs the same.
// Every element of C is summed over k in one fixed order: the same bits at every run. k is at least 1.
#pragma once

#include "vector.hpp"

#include <algorithm>
#include <cstdlib>
#include <new>

// A thread's scratch memory, reused from call to call.
struct Scratch {
    void* memory = nullptr;
    std::size_t size = 0;
    ~Scratch() { std::free(memory); }
    template <class T> T* get(std::size_t count) {
        std::size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
        if (bytes > size) {
            std::free(memory);
            memory = std::malloc(bytes + 64);
            if (!memory) throw std::bad_alloc();
            size = bytes;
        }
        auto address = (reinterpret_cast<std::uintptr_t>(memory) + 63) / 64 * 64;
        return reinterpret_cast<T*>(address);
    }
};

#if defined(__AVX512F__)
constexpr int MR = 14, NV = 2;  // 28 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int MR = 6, NV = 2;  // 12 of 16
#elif defined(__aarch64__)
constexpr int MR = 8, NV = 3;  // 24 of 32
#else
constexpr int MR = 4, NV = 2;  // 8 of 16
#endif
template <class T> constexpr int NR = NV * lanes<T>;

// Blocks of C's rows, of C's columns and of k: a packed B panel of KC rows fits the first-level cache, the packed
// block of A (0.5 MB in float32) and much of B (2.3 MB) the second.
constexpr index_t MC = 24 * MR, NC = 1536, KC = 384;

// Packs `width` columns and `depth` rows of X, X(p, j) = x[p·row + j·column], as out[p·PITCH + j]; columns from
// `width` to PITCH become zeros. One of the two strides is 1. Writes up to lanes<T> elements beyond the last row.
template <class T, int PITCH>
inline void pack_panel(const T* x, index_t row, index_t column, int width, index_t depth, T* out) {
    constexpr int n = lanes<T>;
    if (column == 1) {
        if (width == PITCH) {
            for (index_t p = 0; p < depth; ++p) std::memcpy(out + p * PITCH, x + p * row, PITCH * sizeof(T));
        } else {
            for (index_t p = 0; p < depth; ++p)
                for (int j = 0; j < PITCH; ++j) out[p * PITCH + j] = j < width ? x[p * row + j] : T(0);
        }
        return;
    }
    index_t p = 0;
    for (; p + n <= depth; p += n) {
        vec<T> block[(PITCH + n - 1) / n][n];
#pragma GCC unroll 4
        for (int strip = 0; strip < (PITCH + n - 1) / n; ++strip) {
            vec<T>(&square)[n] = block[strip];
#pragma GCC unroll 16
            for (int j = 0; j < n; ++j)
                square[j] = strip * n + j < width ? load(x + p + (strip * n + j) * column) : vec<T>{};
            transpose<T>(square);
        }
        for (int i = 0; i < n; ++i)  // ascending: what a row writes past its end, the next row overwrites
#pragma GCC unroll 4
            for (int strip = 0; strip < (PITCH + n - 1) / n; ++strip)
                store(out + (p + i) * PITCH + strip * n, block[strip][i]);
    }
    for (; p < depth; ++p)
        for (int j = 0; j < PITCH; ++j) out[p * PITCH + j] = j < width ? x[p + j * column] : T(0);
}

// The first ROWS rows of the tile that `micro_kernel` computes, of which `rows` exist.
template <class T, int ROWS>
__attribute__((noinline)) void tile_kernel(
    index_t depth, const T* a, index_t a_pitch, const T* b, T* c, index_t pitch, int rows, int columns, bool add,
    const T* bias
) {
    constexpr int n = lanes<T>, ahead = 16;  // rows of the panels to prefetch: 5–10 % faster in all
    vec<T> tile[ROWS][NV];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) tile[i][j] = vec<T>{};
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; j += n) __builtin_prefetch(c + i * pitch + j, 1);
    for (index_t p = 0; p < depth; ++p, a += a_pitch, b += NR<T>) {
        for (int j = 0; j < NV; ++j) __builtin_prefetch(b + ahead * NR<T> + j * n);
        __builtin_prefetch(a + ahead * a_pitch);
        vec<T> row[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) row[j] = load(b + j * n);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            vec<T> factor = splat(a[i]);
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) tile[i][j] += factor * row[j];
        }
    }
    if (bias) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
            vec<T> shift = columns > j * n ? load(bias + j * n, columns - j * n) : vec<T>{};
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i) tile[i][j] += shift;
        }
    }
    if (rows == ROWS && columns == NR<T>) {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) {
                T* to = c + i * pitch + j * n;
                store(to, add ? load(to) + tile[i][j] : tile[i][j]);
            }
        return;
    }
    T edge[ROWS * NR<T>];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) store(edge + i * NR<T> + j * n, tile[i][j]);
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) {
            T& to = c[i * pitch + j];
            to = add ? to + edge[i * NR<T> + j] : edge[i * NR<T> + j];
        }
}

// C tile (rows ≤ MR, columns ≤ NR) = (or +=) A panel · packed B panel (+ bias per column), where row p of the panel
// of A is a[p·a_pitch …] (packed: a_pitch = MR) with MR readable elements. Tiles of few rows use a smaller kernel.
template <class T>
inline void micro_kernel(
    index_t depth, const T* a, index_t a_pitch, const T* b, T* c, index_t pitch, int rows, int columns, bool add,
    const T* bias
) {
    constexpr int half = (MR + 2) / 2, quarter = (MR + 3) / 4;
    auto kernel = rows > half ? tile_kernel<T, MR> : rows > quarter ? tile_kernel<T, half> : tile_kernel<T, quarter>;
    kernel(depth, a, a_pitch, b, c, pitch, rows, columns, add, bias);
}

// A(i, p) = a[i·a_row + p·a_column], B(p, j) = b[p·b_row + j·b_column], C(i, j) = c[i·pitch + j].
template <class T>
void gemm(
    index_t m, index_t n, index_t k, const T* a, index_t a_row, index_t a_column, const T* b, index_t b_row,
    index_t b_column, T* c, index_t pitch, bool add, const T* bias
) {
    static thread_local Scratch a_memory, b_memory;
    T* packed_a = a_memory.get<T>((std::min(m, MC) + MR) * std::min(k, KC) + lanes<T>);
    T* packed_b = b_memory.get<T>((std::min(n, NC) + NR<T>)*std::min(k, KC) + lanes<T>);
    for (index_t jc = 0; jc < n; jc += NC)
        for (index_t pc = 0; pc < k; pc += KC) {
            index_t nc = std::min<index_t>(NC, n - jc), kc = std::min<index_t>(KC, k - pc);
            for (index_t j = 0; j < nc; j += NR<T>)
                pack_panel<T, NR<T>>(
                    b + pc * b_row + (jc + j) * b_column, b_row, b_column, std::min<index_t>(NR<T>, nc - j), kc,
                    packed_b + j * kc
                );
            const T* shift = bias && pc + kc == k ? bias + jc : nullptr;
            for (index_t ic = 0; ic < m; ic += MC) {
                index_t mc = std::min<index_t>(MC, m - ic);
                for (index_t i = 0; i < mc; i += MR)
                    pack_panel<T, MR>(
                        a + (ic + i) * a_row + pc * a_column, a_column, a_row, std::min<index_t>(MR, mc - i), kc,
                        packed_a + i * kc
                    );
                for (index_t j = 0; j < nc; j += NR<T>)
                    for (index_t i = 0; i < mc; i += MR)
                        micro_kernel(
                            kc, packed_a + i * kc, MR, packed_b + j * kc, c + (ic + i) * pitch + jc + j, pitch,
                            int(std::min<index_t>(MR, mc - i)), int(std::min<index_t>(NR<T>, nc - j)), add || pc > 0,
                            shift ? shift + j : nullptr
                        );
            }
        }
}
