// The lattice's symmetry on head dimensions (formulas: ops/reference/symmetry.py).
#pragma once

#include "gemm.hpp"
#include "status.hpp"

constexpr int ELEMENTS = 24, ROTATIONS = 12;

// Action of every element as x → straight·x + crossed·(x with the two of each pair exchanged)
template <class T> struct SymmetryTables {
    index_t width, pitch;   // dimensions acted on; the same rounded up to whole vectors
    T *straight, *crossed;  // (ELEMENTS, pitch)

    // turns: (ELEMENTS, pairs, 2), cosines and sines; elements from ROTATIONS on reflect first
    SymmetryTables(index_t pairs, const T* turns, bool transposed, Scratch& memory)
        : width(2 * pairs), pitch((width + lanes<T> - 1) / lanes<T> * lanes<T>),
          straight(memory.get<T>(2 * ELEMENTS * pitch)), crossed(straight + ELEMENTS * pitch) {
        std::fill_n(straight, 2 * ELEMENTS * pitch, T(0));
        for (index_t e = 0; e < ELEMENTS; ++e)
            for (index_t m = 0; m < pairs; ++m) {
                const T *turn = turns + 2 * (e * pairs + m), sign = T(e < ROTATIONS ? 1 : -1);
                const index_t to = e * pitch + 2 * m;
                straight[to] = turn[0];
                straight[to + 1] = sign * turn[0];
                crossed[to] = transposed ? turn[1] : -sign * turn[1];
                crossed[to + 1] = transposed ? -sign * turn[1] : turn[1];
            }
    }

    // Acts on one head's vector x of `size` elements
    INLINE void apply(T* x, index_t size, index_t element) const {
        const T *a = straight + element * pitch, *b = crossed + element * pitch;
        for (index_t i = 0; i < width; i += lanes<T>) {
            const vec<T> old = load(x + i, size - i);
            const vec<T> changed = old * load(a + i) + swap_neighbours<T>(old) * load(b + i);
            store(x + i, select<T>(lane_numbers<T>() < ivec<T>{} + lane_t<T>(width - i), changed, old), size - i);
        }
    }
};

// x(b, t, h, d) = x[b·item + t·row + h·head + d], elements (batch, length); tables as in SymmetryTables. BAD_INDEX,
// x unchanged, for a number that is no element.
template <class T> int symmetry(
    index_t batch, index_t length, index_t heads, index_t size, index_t pairs, T* x, index_t item, index_t row,
    index_t head, const std::int32_t* elements, const T* turns, int backward
) {
    static thread_local Scratch memory;
    return guarded([&] {
        const SymmetryTables<T> tables(pairs, turns, backward != 0, memory);
        for (index_t i = 0; i < batch * length; ++i)
            if (elements[i] < 0 || elements[i] >= ELEMENTS) return BAD_INDEX;
        for (index_t b = 0; b < batch; ++b)
            for (index_t t = 0; t < length; ++t)
                for (index_t h = 0; h < heads; ++h)
                    tables.apply(x + b * item + t * row + h * head, size, elements[b * length + t]);
        return DONE;
    });
}
