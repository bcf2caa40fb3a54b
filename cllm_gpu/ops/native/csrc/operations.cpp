// Entry points, each for float32 (suffix _f32) and float64 (_f64). Arrays are contiguous unless strides are given, in
// elements. The caller (cllm_gpu/ops/native/*.py) has checked types and shapes. Returns 0 or one of the errors below.
#include "adam.hpp"
#include "attention.hpp"
#include "cross_entropy.hpp"
#include "dropout.hpp"
#include "embedding.hpp"
#include "gelu.hpp"
#include "layernorm.hpp"
#include "linear.hpp"
#include "rotary.hpp"
#include "sgd.hpp"
#include "squared_norm.hpp"
#include "symmetry.hpp"

namespace {

enum Status { DONE = 0, NO_MEMORY = 1, BAD_INDEX = 2 };

template <class F> int guarded(F work) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}

template <class T, class U> Heads<T> heads(U* data, const index_t* strides) {
    return {data, strides[0], strides[1], strides[2]};
}

// Calls work(&tile of the score bias), or work(null) without a bias
template <class T, class F> int guarded_with(const ScoreBias<T>* given, const AttentionShape& shape, T scale, F work) {
    static thread_local Scratch memory;
    return guarded([&] {
        if (!given) {
            work(nullptr);
        } else {
            ScoreBiasTile<T> score_bias(*given, shape.keys, scale, memory);
            work(&score_bias);
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
    return guarded_with<T>(given, shape, scale, [&](ScoreBiasTile<T>* score_bias) {
        ::attention_forward<T>(
            shape, heads<const T>(q, strides), heads<const T>(k, strides + 3), heads<const T>(v, strides + 6),
            heads<T>(out, strides + 9), lse, scale, score_bias
        );
    });
}

template <class T>
int attention_backward(
    const index_t* sizes, int causal, const T* dout, const T* q, const T* k, const T* v, const T* out, T* dq, T* dk,
    T* dv, const index_t* strides, const T* lse, T scale, const ScoreBias<T>* given
) {
    const AttentionShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], causal != 0};
    return guarded_with<T>(given, shape, scale, [&](ScoreBiasTile<T>* score_bias) {
        ::attention_backward<T>(
            shape, heads<const T>(dout, strides), heads<const T>(q, strides + 3), heads<const T>(k, strides + 6),
            heads<const T>(v, strides + 9), heads<const T>(out, strides + 12), lse, heads<T>(dq, strides + 15),
            heads<T>(dk, strides + 18), heads<T>(dv, strides + 21), scale, score_bias
        );
    });
}

template <class T>
int symmetry(
    index_t b, index_t t, index_t h, index_t d, index_t pairs, T* x, index_t item, index_t row, index_t head,
    const std::int32_t* elements, const T* turns, int backward
) {
    static thread_local Scratch memory;
    return guarded([&] {
        const SymmetryTables<T> tables(pairs, turns, backward != 0, memory);
        return ::symmetry<T>(b, t, h, d, x, item, row, head, elements, tables) ? DONE : BAD_INDEX;
    });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define ENTRY_POINTS(T, name)                                                                                          \
    EXPORT int linear_forward_##name(                                                                                  \
        void* blas, index_t n, index_t m, index_t k, const T* x, const T* weight, const T* bias, T* out                \
    ) {                                                                                                                \
        return guarded([&] {                                                                                           \
            linear_forward<T>(blas, n, m, k, x, weight, bias, out);                                                    \
            return DONE;                                                                                               \
        });                                                                                                            \
    }                                                                                                                  \
    EXPORT int linear_backward_##name(                                                                                 \
        void* blas, index_t n, index_t m, index_t k, const T* dout, const T* x, const T* weight, T* dx, T* dweight,    \
        T* dbias, int accumulate                                                                                       \
    ) {                                                                                                                \
        return guarded([&] {                                                                                           \
            linear_backward<T>(blas, n, m, k, dout, x, weight, dx, dweight, dbias, accumulate);                        \
            return DONE;                                                                                               \
        });                                                                                                            \
    }                                                                                                                  \
    EXPORT void layernorm_forward_##name(                                                                              \
        index_t n, index_t c, const T* x, const T* weight, const T* bias, T* out, T* mean, T* rstd, T epsilon          \
    ) {                                                                                                                \
        layernorm_forward<T>(n, c, x, weight, bias, out, mean, rstd, epsilon);                                         \
    }                                                                                                                  \
    EXPORT void residual_layernorm_forward_##name(                                                                     \
        index_t n, index_t c, const T* residual, const T* branch, const T* weight, const T* bias, T* residual_out,     \
        T* out, T* mean, T* rstd, T epsilon                                                                            \
    ) {                                                                                                                \
        residual_layernorm_forward<T>(n, c, residual, branch, weight, bias, residual_out, out, mean, rstd, epsilon);   \
    }                                                                                                                  \
    EXPORT void layernorm_backward_##name(                                                                             \
        index_t n, index_t c, const T* dout, const T* x, const T* weight, const T* mean, const T* rstd,                \
        const T* dresidual, T* dx, T* dweight, T* dbias, int accumulate                                                \
    ) {                                                                                                                \
        start_sum(c, dweight, accumulate);                                                                             \
        start_sum(c, dbias, accumulate);                                                                               \
        layernorm_backward<T>(n, c, dout, x, weight, mean, rstd, dresidual, dx, dweight, dbias);                       \
    }                                                                                                                  \
    EXPORT void gelu_forward_##name(index_t n, index_t m, T* x, const T* bias, T* out) {                               \
        gelu_forward<T>(n, m, x, bias, out);                                                                           \
    }                                                                                                                  \
    EXPORT void gelu_backward_##name(                                                                                  \
        index_t n, index_t m, const T* dout, const T* x, T* dx, T* dbias, int accumulate                               \
    ) {                                                                                                                \
        start_sum(m, dbias, accumulate);                                                                               \
        gelu_backward<T>(n, m, dout, x, dx, dbias);                                                                    \
    }                                                                                                                  \
    EXPORT int cross_entropy_##name(                                                                                   \
        index_t n, index_t v, T* logits, const std::int32_t* targets, T* losses, std::int32_t ignored, int gradient,   \
        T gradient_scale                                                                                               \
    ) {                                                                                                                \
        return cross_entropy<T>(n, v, logits, targets, losses, ignored, gradient != 0, gradient_scale) ? DONE          \
                                                                                                       : BAD_INDEX;    \
    }                                                                                                                  \
    EXPORT int embedding_forward_##name(                                                                               \
        index_t b, index_t t, index_t c, index_t v, const std::int32_t* tokens, const T* table, const T* positions,    \
        T* out                                                                                                         \
    ) {                                                                                                                \
        return embedding_forward<T>(b, t, c, v, tokens, table, positions, out) ? DONE : BAD_INDEX;                     \
    }                                                                                                                  \
    EXPORT int embedding_backward_##name(                                                                              \
        index_t b, index_t t, index_t c, index_t v, const T* dout, const std::int32_t* tokens, T* dtable, T* dpositions\
    ) {                                                                                                                \
        return embedding_backward<T>(b, t, c, v, dout, tokens, dtable, dpositions) ? DONE : BAD_INDEX;                 \
    }                                                                                                                  \
    EXPORT void rotary_##name(                                                                                         \
        index_t b, index_t t, index_t h, index_t half, T* x, index_t item, index_t row, index_t head, const T* cosine, \
        const T* sine, T direction                                                                                     \
    ) {                                                                                                                \
        rotary<T>(b, t, h, half, x, item, row, head, cosine, sine, direction);                                         \
    }                                                                                                                  \
    EXPORT int symmetry_##name(                                                                                        \
        index_t b, index_t t, index_t h, index_t d, index_t pairs, T* x, index_t item, index_t row, index_t head,      \
        const std::int32_t* elements, const T* turns, int backward                                                     \
    ) {                                                                                                                \
        return symmetry<T>(b, t, h, d, pairs, x, item, row, head, elements, turns, backward);                          \
    }                                                                                                                  \
    EXPORT void dropout_##name(                                                                                        \
        index_t size, const T* x, T* out, std::uint64_t first, std::uint64_t seed, std::uint32_t stream0,              \
        std::uint32_t stream1, std::uint64_t threshold, T scale                                                        \
    ) {                                                                                                                \
        const PhiloxKey key{std::uint32_t(seed), std::uint32_t(seed >> 32), stream0, stream1};                         \
        dropout<T>(size, x, out, first, key, threshold, scale);                                                        \
    }                                                                                                                  \
    EXPORT int attention_forward_##name(                                                                               \
        const index_t* sizes, int causal, const T* q, const T* k, const T* v, T* out, const index_t* strides, T* lse,  \
        T scale, const ScoreBias<T>* score_bias                                                                        \
    ) {                                                                                                                \
        return attention_forward<T>(sizes, causal, q, k, v, out, strides, lse, scale, score_bias);                     \
    }                                                                                                                  \
    EXPORT int attention_backward_##name(                                                                              \
        const index_t* sizes, int causal, const T* dout, const T* q, const T* k, const T* v, const T* out, T* dq,      \
        T* dk, T* dv, const index_t* strides, const T* lse, T scale, const ScoreBias<T>* score_bias                    \
    ) {                                                                                                                \
        return attention_backward<T>(sizes, causal, dout, q, k, v, out, dq, dk, dv, strides, lse, scale, score_bias);  \
    }                                                                                                                  \
    EXPORT double adam_step_##name(                                                                                    \
        index_t size, index_t decayed, T* p, const T* g, T* m, T* v, const double* numbers, int decoupled              \
    ) {                                                                                                                \
        return adam_step<T>(size, decayed, p, g, m, v, numbers, decoupled);                                            \
    }                                                                                                                  \
    EXPORT double sgd_step_##name(                                                                                     \
        index_t size, index_t decayed, T* p, const T* g, T* velocity, const double* numbers                            \
    ) {                                                                                                                \
        return sgd_step<T>(size, decayed, p, g, velocity, numbers);                                                    \
    }                                                                                                                  \
    EXPORT double squared_norm_##name(index_t size, const T* x) { return squared_norm<T>(size, x); }                   \
    EXPORT void exponential_##name(index_t size, const T* x, T* out) {                                                 \
        for (index_t i = 0; i < size; i += lanes<T>)                                                                   \
            store(out + i, exponential<T>(load(x + i, size - i)), size - i);                                           \
    }                                                                                                                  \
    EXPORT void add_buffer_##name(index_t size, T* to, const T* part) { add_to<T>(size, to, part); }

ENTRY_POINTS(float, f32)
ENTRY_POINTS(double, f64)
