// The library's entry points, each for float32 and float64. Arrays are contiguous unless strides are given, in
// elements. The caller (cllm_gpu/ops/native/*.py) has checked types and shapes. Those that can fail return a Status.
//
// A new one is a function template of its real type T in its header, and its name below: library.py reads the table,
// types of arguments included.
#include "adam.hpp"
#include "attention.hpp"
#include "cross_entropy.hpp"
#include "dropout.hpp"
#include "embedding.hpp"
#include "entry.hpp"
#include "gelu.hpp"
#include "layernorm.hpp"
#include "linear.hpp"
#include "rotary.hpp"
#include "sgd.hpp"
#include "squared_norm.hpp"
#include "symmetry.hpp"

template <class T> const Entry* entries() {
    static const Entry table[] = {
        ENTRY(linear_forward),
        ENTRY(linear_backward),
        ENTRY(layernorm_forward),
        ENTRY(residual_layernorm_forward),
        ENTRY(layernorm_backward),
        ENTRY(gelu_forward),
        ENTRY(gelu_backward),
        ENTRY(cross_entropy),
        ENTRY(embedding_forward),
        ENTRY(embedding_backward),
        ENTRY(rotary),
        ENTRY(symmetry),
        ENTRY(dropout),
        ENTRY(attention_forward),
        ENTRY(attention_backward),
        ENTRY(adam_step),
        ENTRY(sgd_step),
        ENTRY(squared_norm),
        ENTRY(exponentials),
        {},
    };
    return table;
}

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT const Entry* entries_float32() { return entries<float>(); }
EXPORT const Entry* entries_float64() { return entries<double>(); }
