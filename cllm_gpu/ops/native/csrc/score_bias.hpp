// Attention score bias of the lattice (formulas: ops/reference/score_bias.py), for the tiles of attention.hpp. Tiles
// hold products q·k before they are multiplied by `scale`, so the bias is added divided by scale, and gradients are
// computed from dS times scale.
//
// A pair of positions is a lane: one side is the same in all lanes, the other consecutive. A match of m + 1 tokens is
// one comparison more than a match of m. All of them are made, of every pair and again for every head: stopping where
// no lane is left costs more in mispredicted branches than it saves, and remembering would take a T×S array.
#pragma once

#include "gemm.hpp"

constexpr int MATCHES = 8;
enum Term { DISTANCE, PRIME_DISTANCE, SAME_TOKEN, FIRST_MATCH, TERMS = FIRST_MATCH + MATCHES };

// Arguments from the caller, fields in the order of cllm_gpu/ops/native/score_bias.py; pitches in elements
template <class T> struct ScoreBias {
    const std::int32_t* tokens;  // (B, S)
    const T *points, *scalars;   // (B, S, 3), null if no distance is in use; (H, n)
    T *dscalars, *dpoints;       // added to; null if not wanted
    index_t tokens_item, points_item, points_row, scalars_row, dscalars_row, dpoints_item, dpoints_row;
    index_t in_use[FIRST_MATCH], matches;  // whether each term before the matches is in use; number of match orders
};

template <class T> struct Coordinates {
    T* axis[3];
    Coordinates operator+(index_t places) const { return {{axis[0] + places, axis[1] + places, axis[2] + places}}; }
};

// One side of lanes<T> pairs: consecutive positions, starting where `tokens` and `points` point …
template <class T> struct Consecutive {
    const lane_t<T>* tokens;
    Coordinates<T> points;
    INLINE ivec<T> token(int back) const { return load_integers<T>(tokens - back); }
    INLINE vec<T> coordinate(int axis) const { return load(points.axis[axis]); }
};
// … or that one position broadcast to all lanes
template <class T> struct Single {
    const lane_t<T>* tokens;
    Coordinates<T> points;
    INLINE ivec<T> token(int back) const { return ivec<T>{} + *(tokens - back); }
    INLINE vec<T> coordinate(int axis) const { return splat(*points.axis[axis]); }
};

template <class T> INLINE vec<T> magnitude(vec<T> x) { return maximum<T>(x, -x); }

// Features of lanes<T> pairs of positions
template <class T, class Query, class Key> struct Pairs {
    const Query& query;
    const Key& key;
    INLINE void difference(vec<T> (&by_axis)[3]) const {
#pragma GCC unroll 3
        for (int axis = 0; axis < 3; ++axis) by_axis[axis] = query.coordinate(axis) - key.coordinate(axis);
    }
    static INLINE vec<T> length(const vec<T> (&x)[3]) {
        return square_root<T>(x[0] * x[0] + x[1] * x[1] + x[2] * x[2]);
    }
    INLINE ivec<T> same_token() const { return query.token(0) == key.token(0); }
    // Calls take(m, lanes in which m + 1 tokens match) for m = 0 … matches − 1
    template <class F> INLINE void for_matches(int matches, F take) const {
        ivec<T> matching = ~ivec<T>{};
#pragma GCC unroll 8
        for (int m = 0; m < MATCHES; ++m) {
            if (m >= matches) return;
            matching &= query.token(m) == key.token(m + 1);
            take(m, matching);
        }
    }
};

// A head's scalars with the signs of their terms, divided by `scale`; 0 for terms not in use
template <class T> struct HeadScalars {
    T value[TERMS];
    bool distance, prime_distance, same_token;
    int matches;

    template <class Query, class Key> INLINE vec<T> score(const Query& query, const Key& key) const {
        const Pairs<T, Query, Key> pair{query, key};
        vec<T> total{};
        if (distance || prime_distance) {
            vec<T> between[3];
            pair.difference(between);
            if (distance) total += pair.length(between) * value[DISTANCE];
            if (prime_distance) total += magnitude<T>(between[2]) * value[PRIME_DISTANCE];
        }
        if (same_token) total += select<T>(pair.same_token(), splat(value[SAME_TOKEN]), vec<T>{});
        pair.for_matches(matches, [&](int m, ivec<T> matching) {
            total += select<T>(matching, splat(value[FIRST_MATCH + m]), vec<T>{});
        });
        return total;
    }

    // part[term] += the gradient of its scalar from d, without the term's sign
    template <class Query, class Key>
    INLINE void gradients(const Query& query, const Key& key, vec<T> d, vec<T> (&part)[TERMS]) const {
        const Pairs<T, Query, Key> pair{query, key};
        if (distance || prime_distance) {
            vec<T> between[3];
            pair.difference(between);
            if (distance) part[DISTANCE] += d * pair.length(between);
            if (prime_distance) part[PRIME_DISTANCE] += d * magnitude<T>(between[2]);
        }
        if (same_token) part[SAME_TOKEN] += select<T>(pair.same_token(), d, vec<T>{});
        pair.for_matches(matches, [&](int m, ivec<T> matching) {
            part[FIRST_MATCH + m] += select<T>(matching, d, vec<T>{});
        });
    }

    // Gradient of the points' difference; 0 for equal points
    template <class Query, class Key>
    INLINE void slopes(const Query& query, const Key& key, vec<T> d, vec<T> (&slope)[3]) const {
        const Pairs<T, Query, Key> pair{query, key};
        vec<T> between[3];
        pair.difference(between);
        const vec<T> length = pair.length(between);
        const vec<T> by_length = d * value[DISTANCE] / select<T>(length > T(0), length, splat(T(1)));
        for (int axis = 0; axis < 3; ++axis) slope[axis] = by_length * between[axis];
        const vec<T> zero{}, one = splat(T(1));
        const vec<T> sign = select<T>(between[2] > zero, one, zero) - select<T>(between[2] < zero, one, zero);
        slope[2] += d * value[PRIME_DISTANCE] * sign;
    }
};

// The bias of one batch item at a time, and of one of its heads at a time
template <class T> class ScoreBiasTile {
  public:
    ScoreBiasTile(const ScoreBias<T>& score_bias, index_t positions, T factor, Scratch& memory)
        : given(score_bias), keys(positions), scale(factor) {
        const index_t pitch = MATCHES + 1 + keys + NR<T>;  // padded before the first token and after the last
        T* next = memory.get<T>(8 * pitch);
        for (Coordinates<T>* of : {&points, &dpoints})
            for (T*& axis : of->axis) {
                axis = next;
                next += pitch;
            }
        std::fill_n(points.axis[0], 6 * pitch, T(0));
        lane_t<T>* tokens = reinterpret_cast<lane_t<T>*>(next);
        std::fill_n(tokens, pitch, lane_t<T>(-1));  // padding: matches neither a token nor the keys' padding
        std::fill_n(tokens + pitch, pitch, lane_t<T>(-2));
        of_queries = tokens + MATCHES + 1;
        of_keys = of_queries + pitch;
    }

    void start_item(index_t b) {
        const std::int32_t* tokens = given.tokens + b * given.tokens_item;
        for (index_t s = 0; s < keys; ++s) of_queries[s] = of_keys[s] = tokens[s];
        if (!given.points) return;
        for (int axis = 0; axis < 3; ++axis)
            for (index_t s = 0; s < keys; ++s) {
                points.axis[axis][s] = given.points[b * given.points_item + s * given.points_row + axis];
                dpoints.axis[axis][s] = T(0);
            }
    }

    void start_head(index_t h) {
        const T* next = given.scalars + h * given.scalars_row;
        for (int term = 0; term < TERMS; ++term) {
            head.value[term] = uses(term) ? sign(term) * *next++ / scale : T(0);
            sums[term] = vec<T>{};
        }
        head.distance = uses(DISTANCE);
        head.prime_distance = uses(PRIME_DISTANCE);
        head.same_token = uses(SAME_TOKEN);
        head.matches = int(given.matches);
    }

    // x(s, l) += the bias of query `first + l` and key s, for NR queries and s < seen; pitch NR
    void add_to_columns(T* x, index_t first, index_t seen) const {
        const HeadScalars<T> own = head;  // a local copy, which does not alias x
        for (int strip = 0; strip < NV; ++strip) {
            const index_t i = first + strip * lanes<T>;
            const Consecutive<T> query{of_queries + i, points + i};
            Single<T> key{of_keys, points};
            T* at = x + strip * lanes<T>;
            for (index_t s = 0; s < seen; ++s, at += NR<T>, key = {key.tokens + 1, key.points + 1})
                store(at, load(at) + own.score(query, key));
        }
    }

    // x(r, s) += the bias of query `first + r` and key s, for s < seen, rounded up to whole vectors
    void add_to_rows(T* x, index_t pitch, int rows, index_t first, index_t seen) const {
        const HeadScalars<T> own = head;
        for (index_t s = 0; s < seen; s += lanes<T>) {
            const Consecutive<T> key{of_keys + s, points + s};
            Single<T> query{of_queries + first, points + first};
            T* at = x + s;
            for (int r = 0; r < rows; ++r, at += pitch, query = {query.tokens + 1, query.points + 1})
                store(at, load(at) + own.score(query, key));
        }
    }

    // Accumulates the gradients from dscores(r, s) of queries `first + r` and keys s < seen
    void take_gradients(const T* dscores, index_t pitch, int rows, index_t first, index_t seen) {
        if (!given.dscalars && !given.dpoints) return;
        const HeadScalars<T> own = head;
        vec<T> part[TERMS] = {};  // sums over these rows only: in registers, and with less rounding error
        for (index_t s = 0; s < seen; s += lanes<T>) {
            const Consecutive<T> key{of_keys + s, points + s};
            const ivec<T> there = lane_numbers<T>() < ivec<T>{} + lane_t<T>(seen - s);
            Single<T> query{of_queries + first, points + first};
            const T* at = dscores + s;
            for (int r = 0; r < rows; ++r, at += pitch, query = {query.tokens + 1, query.points + 1})
                own.gradients(query, key, select<T>(there, load(at), vec<T>{}), part);
        }
        for (int term = 0; term < TERMS; ++term) sums[term] += part[term];
        if (given.dpoints)
            for (int r = 0; r < rows; ++r) take_point_gradients(dscores + r * pitch, first + r, seen);
    }

    void finish_head(index_t h) const {
        if (!given.dscalars) return;
        T* next = given.dscalars + h * given.dscalars_row;
        for (int term = 0; term < TERMS; ++term)
            if (uses(term)) *next++ += sign(term) * sum<T>(sums[term]) / scale;
    }

    void finish_item(index_t b) const {
        if (!given.dpoints) return;
        for (index_t s = 0; s < keys; ++s)
            for (int axis = 0; axis < 3; ++axis)
                given.dpoints[b * given.dpoints_item + s * given.dpoints_row + axis] += dpoints.axis[axis][s];
    }

  private:
    const ScoreBias<T>& given;
    const index_t keys;
    const T scale;
    lane_t<T> *of_queries, *of_keys;  // the same tokens with different padding before the first
    Coordinates<T> points, dpoints;
    HeadScalars<T> head;
    vec<T> sums[TERMS];

    static T sign(int term) { return term == DISTANCE || term == PRIME_DISTANCE ? T(-1) : T(1); }
    bool uses(int term) const {
        return term < FIRST_MATCH ? given.in_use[term] != 0 : term - FIRST_MATCH < given.matches;
    }

    void take_point_gradients(const T* dscores, index_t position, index_t seen) {
        const HeadScalars<T> own = head;
        const Single<T> query{of_queries + position, points + position};
        vec<T> total[3] = {};
        for (index_t s = 0; s < seen; s += lanes<T>) {
            vec<T> slope[3];
            own.slopes(query, Consecutive<T>{of_keys + s, points + s}, load(dscores + s, seen - s), slope);
            for (int axis = 0; axis < 3; ++axis) {
                T* to = dpoints.axis[axis] + s;
                total[axis] += slope[axis];
                store(to, load(to) - slope[axis]);
            }
        }
        for (int axis = 0; axis < 3; ++axis) dpoints.axis[axis][position] += sum<T>(total[axis]);
    }
};
