// Causal or full attention, forward and backward, one thread (formulas: ops/reference/attention.py).
//
// Forward: one block of NR queries at a time, queries along the vector. Sᵀ = K·Qᵀ is computed in the layout in which Pᵀ
// is the packed right-hand side of Oᵀ = Vᵀ·Pᵀ, and softmax runs down the columns without horizontal sums.
// Backward: one block of queries at a time, keys along the vector. P and dS are the left-hand sides of dV += Pᵀ·dO and
// dK += dSᵀ·Q without packing; only dS is packed once, for dQ = dS·K. Fully masked tiles are skipped.
// `score_bias`, null without a bias, adds to the scores of a tile and accumulates its gradients from dS.
// Memory: the weights of one block, at most SCORE_BYTES (one panel of queries if the keys alone exceed that).
#pragma once

#include "exponential.hpp"
#include "gemm.hpp"
#include "score_bias.hpp"
#include "status.hpp"

constexpr index_t SCORE_BYTES = 256 << 10;

// x(b, t, h, d) = data[b·item + t·row + h·head + d]
template <class T> struct Heads {
    T* data;
    index_t item, row, head;
    T* at(index_t b, index_t h) const { return data + b * item + h * head; }
};

struct AttentionShape {
    index_t batch, queries, keys, heads, kv_heads, size;
    bool causal;
    index_t before() const { return keys - queries; }  // keys before the position of the first query
    index_t seen(index_t query) const { return causal ? before() + query + 1 : keys; }
    // first query that attends to key `key`
    index_t first_seeing(index_t key) const { return causal ? std::max<index_t>(0, key - before()) : 0; }
};

template <int STEP> constexpr index_t round_up(index_t x) { return (x + STEP - 1) / STEP * STEP; }

// Consecutive panels of `PITCH` columns of X(p, j) = x[p·row + j·column], of `depth` rows each.
template <class T, int PITCH>
void pack(const T* x, index_t row, index_t column, index_t columns, index_t depth, T* out) {
    for (index_t j = 0; j < columns; j += PITCH)
        pack_panel<T, PITCH>(
            x + j * column, row, column, int(std::min<index_t>(PITCH, columns - j)), depth, out + j * depth
        );
}

// out(j, i) = x(i, j)·factor(j) for i < rows, j < columns ≤ NR; x has pitch NR<T> and round_up(rows) readable rows
template <class T>
void write_transposed(const T* x, index_t rows, index_t columns, const T* factor, T* out, index_t pitch) {
    constexpr int n = lanes<T>;
    for (index_t i = 0; i < rows; i += n)
        for (index_t j = 0; j < columns; j += n) {
            vec<T> square[n];
#pragma GCC unroll 16
            for (int l = 0; l < n; ++l) square[l] = load(x + (i + l) * NR<T> + j);
            transpose<T>(square);
            for (index_t l = 0; l < std::min<index_t>(n, columns - j); ++l)
                store(out + (j + l) * pitch + i, square[l] * factor[j + l], rows - i);
        }
}

// For each of NR columns: x becomes e^(scale·x − max), 0 for masked keys; also the columns' sums and log-sum-exps.
template <class T>
void softmax_columns(T* x, index_t keys, index_t first_query, const AttentionShape& shape, T scale, T* sums, T* lse) {
    constexpr int n = lanes<T>;
    const index_t common = shape.causal ? std::min(keys, shape.seen(first_query)) : keys;
    for (int strip = 0; strip < NV; ++strip) {
        T* column = x + strip * n;
        ivec<T> lane;
        for (int l = 0; l < n; ++l) lane[l] = lane_t<T>(strip * n + l);
        vec<T> most = splat(-T(__builtin_inf())), total{};
        for (index_t s = 0; s < keys; ++s) {
            vec<T> score = load(column + s * NR<T>) * scale;
            if (s >= common) {  // key `common` is unmasked from lane 1 on, the next from lane 2 on, …
                score = select<T>(lane > ivec<T>{} + lane_t<T>(s - common), score, splat(-T(__builtin_inf())));
                store(column + s * NR<T>, score);
            }
            most = maximum<T>(most, score);
        }
        for (index_t s = 0; s < keys; ++s) {
            vec<T> score = load(column + s * NR<T>);
            vec<T> y = exponential<T>((s >= common ? score : score * scale) - most);
            total += y;
            store(column + s * NR<T>, y);
        }
        for (int l = 0; l < n; ++l) {
            sums[strip * n + l] = T(1) / total[l];
            lse[strip * n + l] = most[l] + std::log(total[l]);
        }
    }
}

template <class T>
void attend(
    const AttentionShape& shape, Heads<const T> q, Heads<const T> k, Heads<const T> v, Heads<T> out, T* lse, T scale,
    ScoreBiasTile<T>* score_bias
) {
    const index_t size = shape.size, group = shape.heads / shape.kv_heads;
    const index_t keys = round_up<MR>(shape.keys), width = round_up<MR>(size);
    static thread_local Scratch memory;
    T* packed_k = memory.get<T>(
        keys * size + width * shape.keys + NR<T> * (size + keys + width + lanes<T> + 2) + 4 * lanes<T>
    );
    T* packed_v = packed_k + keys * size + lanes<T>;
    T* packed_q = packed_v + width * shape.keys + lanes<T>;
    T* weights = packed_q + NR<T> * size + lanes<T>;
    T* attended = weights + NR<T> * keys;
    T* inverse = attended + NR<T> * (width + lanes<T>);
    T* log_sum = inverse + NR<T>;
    for (index_t b = 0; b < shape.batch; ++b) {
        if (score_bias) score_bias->start_item(b);
        for (index_t h = 0; h < shape.heads; ++h) {
            if (score_bias) score_bias->start_head(h);
            if (h % group == 0) {
                pack<T, MR>(k.at(b, h / group), 1, k.row, shape.keys, size, packed_k);
                pack<T, MR>(v.at(b, h / group), v.row, 1, size, shape.keys, packed_v);
            }
            for (index_t t = 0; t < shape.queries; t += NR<T>) {
                const index_t count = std::min<index_t>(NR<T>, shape.queries - t);
                const index_t seen = shape.seen(t + count - 1);
                pack_panel<T, NR<T>>(q.at(b, h) + t * q.row, 1, q.row, int(count), size, packed_q);
                for (index_t s = 0; s < seen; s += MR)
                    micro_kernel<T>(
                        size, packed_k + s * size, MR, packed_q, weights + s * NR<T>, NR<T>,
                        int(std::min<index_t>(MR, seen - s)), NR<T>, false, nullptr
                    );
                if (score_bias) score_bias->add_to_columns(weights, shape.before() + t, seen);
                softmax_columns(weights, seen, t, shape, scale, inverse, log_sum);
                for (index_t d = 0; d < size; d += MR)
                    micro_kernel<T>(
                        seen, packed_v + d * shape.keys, MR, weights, attended + d * NR<T>, NR<T>,
                        int(std::min<index_t>(MR, size - d)), NR<T>, false, nullptr
                    );
                write_transposed(attended, size, count, inverse, out.at(b, h) + t * out.row, out.row);
                std::memcpy(lse + (b * shape.heads + h) * shape.queries + t, log_sum, count * sizeof(T));
            }
        }
    }
}

// ---- backward

// Buffers of one block of queries; every pitch is in elements.
template <class T> struct BackwardScratch {
    T *key_columns, *value_columns;  // Kᵀ and Vᵀ in panels of NR keys
    T* key_rows;                     // K in panels of NR head dimensions
    T *query_rows, *dout_rows;       // the block's Q and dO in panels of NR head dimensions
    T *left;                         // packed left-hand side: MR queries × head size, or × keys
    T *weights, *dscores;            // (block, pitch)
    T *dk, *dv;                      // (keys, columns) sums over the queries
    index_t pitch, columns, block;

    BackwardScratch(const AttentionShape& shape, Scratch& memory) {
        const index_t size = shape.size, slack = 4 * lanes<T>;
        const index_t keys = round_up<NR<T>>(shape.keys);
        columns = round_up<NR<T>>(size);
        pitch = keys + MR;  // reads may extend a panel of MR keys past the last key
        const index_t most = std::max<index_t>(1, SCORE_BYTES / index_t(sizeof(T)) / pitch);
        const index_t blocks = (shape.queries + most - 1) / most;
        block = round_up<MR>((shape.queries + blocks - 1) / blocks);
        const index_t sizes[] = {keys * size, keys * size, columns * shape.keys, columns * block, columns * block,
                                 MR * std::max(size, keys), block * pitch, block * pitch,
                                 round_up<MR>(shape.keys) * columns, round_up<MR>(shape.keys) * columns};
        index_t total = 0;
        for (index_t part : sizes) total += part + slack;
        T* next = memory.get<T>(total);
        T** parts[] = {&key_columns, &value_columns, &key_rows, &query_rows, &dout_rows,
                       &left, &weights, &dscores, &dk, &dv};
        for (int i = 0; i < 10; ++i) {
            *parts[i] = next;
            next += round_up<lanes<T>>(sizes[i]) + 2 * lanes<T>;
        }
    }
};

// One row: weights = e^(scale·x − lse) in place of x, dscores in place of dP; 0 for masked keys up to `stop`.
template <class T>
void weights_and_dscores(T* weights, T* dscores, index_t seen, index_t stop, T lse, T delta, T scale) {
    constexpr int n = lanes<T>;
    index_t s = 0;
    for (; s + n <= seen; s += n) {
        vec<T> p = exponential<T>(load(weights + s) * scale - lse);
        store(weights + s, p);
        store(dscores + s, p * (load(dscores + s) - delta) * scale);
    }
    if (s < seen) {
        vec<T> p = exponential<T>(load(weights + s, seen - s) * scale - lse);
        store(weights + s, p, seen - s);
        store(dscores + s, p * (load(dscores + s, seen - s) - delta) * scale, seen - s);
    }
    for (s = seen; s < stop; ++s) weights[s] = dscores[s] = T(0);
}

template <class T> INLINE T dot(index_t count, const T* a, const T* b) {
    vec<T> total{};
    for (index_t i = 0; i < count; i += lanes<T>) total += load(a + i, count - i) * load(b + i, count - i);
    return sum<T>(total);
}

// weights and dscores of the queries t … t + count − 1, and their dQ
template <class T>
void backward_rows(
    const AttentionShape& shape, const BackwardScratch<T>& w, index_t t, index_t count, const T* q, index_t q_row,
    const T* dout, index_t dout_row, const T* out, index_t out_row, const T* lse, T* dq, index_t dq_row, T scale,
    ScoreBiasTile<T>* score_bias
) {
    const index_t size = shape.size;
    for (index_t i = 0; i < count; i += MR) {
        const int rows = int(std::min<index_t>(MR, count - i));
        const index_t seen = shape.seen(t + i + rows - 1);
        T *weights = w.weights + i * w.pitch, *dscores = w.dscores + i * w.pitch;
        pack_panel<T, MR>(q + i * q_row, 1, q_row, rows, size, w.left);
        for (index_t s = 0; s < seen; s += NR<T>)
            micro_kernel<T>(
                size, w.left, MR, w.key_columns + s * size, weights + s, w.pitch, rows, NR<T>, false, nullptr
            );
        pack_panel<T, MR>(dout + i * dout_row, 1, dout_row, rows, size, w.left);
        for (index_t s = 0; s < seen; s += NR<T>)
            micro_kernel<T>(
                size, w.left, MR, w.value_columns + s * size, dscores + s, w.pitch, rows, NR<T>, false, nullptr
            );
        const index_t position = shape.before() + t + i;
        if (score_bias) score_bias->add_to_rows(weights, w.pitch, rows, position, seen);
        for (int r = 0; r < rows; ++r) {
            const T delta = dot(size, dout + (i + r) * dout_row, out + (i + r) * out_row);
            weights_and_dscores(
                weights + r * w.pitch, dscores + r * w.pitch, shape.seen(t + i + r), round_up<MR>(seen), lse[i + r],
                delta, scale
            );
        }
        if (score_bias) score_bias->take_gradients(dscores, w.pitch, rows, position, seen);
        pack_panel<T, MR>(dscores, 1, w.pitch, rows, seen, w.left);
        for (index_t d = 0; d < size; d += NR<T>)
            micro_kernel<T>(
                seen, w.left, MR, w.key_rows + d * shape.keys, dq + i * dq_row + d, dq_row, rows,
                int(std::min<index_t>(NR<T>, size - d)), false, nullptr
            );
    }
}

// dV += Pᵀ·dO and dK += dSᵀ·Q over one block of queries
template <class T>
void backward_columns(const AttentionShape& shape, const BackwardScratch<T>& w, index_t t, index_t count) {
    const index_t seen = shape.seen(t + count - 1);
    for (index_t s = 0; s < seen; s += MR) {
        const int rows = int(std::min<index_t>(MR, seen - s));
        const index_t first = std::max<index_t>(0, shape.first_seeing(s) - t), depth = count - first;
        for (index_t d = 0; d < shape.size; d += NR<T>) {
            const index_t panel = d * count + first * NR<T>, to = s * w.columns + d, from = first * w.pitch + s;
            micro_kernel<T>(
                depth, w.weights + from, w.pitch, w.dout_rows + panel, w.dv + to, w.columns, rows, NR<T>, true, nullptr
            );
            micro_kernel<T>(
                depth, w.dscores + from, w.pitch, w.query_rows + panel, w.dk + to, w.columns, rows, NR<T>, true, nullptr
            );
        }
    }
}

template <class T> void copy_rows(index_t rows, index_t width, const T* from, index_t pitch, T* to, index_t to_pitch) {
    for (index_t r = 0; r < rows; ++r) std::memcpy(to + r * to_pitch, from + r * pitch, width * sizeof(T));
}

template <class T>
void attend_backward(
    const AttentionShape& shape, Heads<const T> dout, Heads<const T> q, Heads<const T> k, Heads<const T> v,
    Heads<const T> out, const T* lse, Heads<T> dq, Heads<T> dk, Heads<T> dv, T scale,
    ScoreBiasTile<T>* score_bias
) {
    static thread_local Scratch memory;
    const BackwardScratch<T> w(shape, memory);
    const index_t size = shape.size, group = shape.heads / shape.kv_heads;
    for (index_t b = 0; b < shape.batch; ++b) {
        if (score_bias) score_bias->start_item(b);
        for (index_t h = 0; h < shape.heads; ++h) {
            if (score_bias) score_bias->start_head(h);
            const index_t kv = h / group;
            if (h % group == 0) {
                pack<T, NR<T>>(k.at(b, kv), 1, k.row, shape.keys, size, w.key_columns);
                pack<T, NR<T>>(v.at(b, kv), 1, v.row, shape.keys, size, w.value_columns);
                pack<T, NR<T>>(k.at(b, kv), k.row, 1, size, shape.keys, w.key_rows);
                std::fill_n(w.dk, round_up<MR>(shape.keys) * w.columns, T(0));
                std::fill_n(w.dv, round_up<MR>(shape.keys) * w.columns, T(0));
            }
            for (index_t t = 0; t < shape.queries; t += w.block) {
                const index_t count = std::min(w.block, shape.queries - t);
                const T *block_q = q.at(b, h) + t * q.row, *block_dout = dout.at(b, h) + t * dout.row;
                pack<T, NR<T>>(block_q, q.row, 1, size, count, w.query_rows);
                pack<T, NR<T>>(block_dout, dout.row, 1, size, count, w.dout_rows);
                backward_rows(
                    shape, w, t, count, block_q, q.row, block_dout, dout.row, out.at(b, h) + t * out.row, out.row,
                    lse + (b * shape.heads + h) * shape.queries + t, dq.at(b, h) + t * dq.row, dq.row, scale,
                    score_bias
                );
                backward_columns(shape, w, t, count);
            }
            if (score_bias) score_bias->finish_head(h);
            if (h % group == group - 1) {
                copy_rows(shape.keys, size, w.dk, w.columns, dk.at(b, kv), dk.row);
                copy_rows(shape.keys, size, w.dv, w.columns, dv.at(b, kv), dv.row);
            }
        }
        if (score_bias) score_bias->finish_item(b);
    }
}

// ---- entry points; strides: item, row and head of every array in turn

template <class T, class U> Heads<T> heads(U* data, const index_t* strides) {
    return {data, strides[0], strides[1], strides[2]};
}

// work(the tiles' terms), or work(null) without any
template <class T, class F> int guarded_with(const ScoreBias<T>* given, const AttentionShape& shape, T scale, F work) {
    static thread_local Scratch memory;
    return guarded([&] {
        if (!given) {
            work(nullptr);
        } else {
            ScoreBiasTile<T> terms(*given, shape.keys, scale, memory);
            work(&terms);
        }
        return DONE;
    });
}

template <class T>
int attention_forward(
    const index_t* sizes, int causal, const T* q, const T* k, const T* v, T* out, const index_t* strides, T* lse,
    T scale, const ScoreBias<T>* given
) {
    const AttentionShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], causal != 0};
    return guarded_with<T>(given, shape, scale, [&](ScoreBiasTile<T>* terms) {
        attend<T>(
            shape, heads<const T>(q, strides), heads<const T>(k, strides + 3), heads<const T>(v, strides + 6),
            heads<T>(out, strides + 9), lse, scale, terms
        );
    });
}

template <class T>
int attention_backward(
    const index_t* sizes, int causal, const T* dout, const T* q, const T* k, const T* v, const T* out, T* dq, T* dk,
    T* dv, const index_t* strides, const T* lse, T scale, const ScoreBias<T>* given
) {
    const AttentionShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], causal != 0};
    return guarded_with<T>(given, shape, scale, [&](ScoreBiasTile<T>* terms) {
        attend_backward<T>(
            shape, heads<const T>(dout, strides), heads<const T>(q, strides + 3), heads<const T>(k, strides + 6),
            heads<const T>(v, strides + 9), heads<const T>(out, strides + 12), lse, heads<T>(dq, strides + 15),
            heads<T>(dk, strides + 18), heads<T>(dv, strides + 21), scale, terms
        );
    });
}
