// Linear layer out = x Wᵀ + b and its gradients (formulas: ops/reference/linear.py). Products are computed by `blas`, a
// cblas_?gemm with 32-bit integers, or by gemm.hpp if it is null.
#pragma once

#include "column_sum.hpp"
#include "gemm.hpp"
#include "status.hpp"

template <class T>
using blas_gemm = void (*)(
    int order, int transpose_a, int transpose_b, int m, int n, int k, T alpha, const T* a, int lda, const T* b, int ldb,
    T beta, T* c, int ldc
);

// C (m, n) = A·B (+ C): A is (m, k), or with ta (k, m) read transposed; B is (k, n), or with tb (n, k).
template <class T> struct Product {
    void* blas;
    void operator()(
        index_t m, index_t n, index_t k, const T* a, bool ta, const T* b, bool tb, T* c, bool add, const T* bias
    ) const {
        const index_t lda = ta ? m : k, ldb = tb ? k : n;
        if (!blas) {
            gemm<T>(m, n, k, a, ta ? 1 : lda, ta ? lda : 1, b, tb ? 1 : ldb, tb ? ldb : 1, c, n, add, bias);
            return;
        }
        if (bias) copy_to_rows(m, n, bias, c);
        constexpr int row_major = 101, as_is = 111, transposed = 112;
        reinterpret_cast<blas_gemm<T>>(blas)(
            row_major, ta ? transposed : as_is, tb ? transposed : as_is, int(m), int(n), int(k), T(1), a, int(lda), b,
            int(ldb), T(add || bias), c, int(n)
        );
    }
};

template <class T>
int linear_forward(void* blas, index_t n, index_t m, index_t k, const T* x, const T* weight, const T* bias, T* out) {
    return guarded([&] {
        Product<T>{blas}(n, m, k, x, false, weight, true, out, false, bias);
        return DONE;
    });
}

// dx and dbias: null if not wanted
template <class T>
int linear_backward(
    void* blas, index_t n, index_t m, index_t k, const T* dout, const T* x, const T* weight, T* dx, T* dweight,
    T* dbias, int accumulate
) {
    return guarded([&] {
        Product<T>{blas}(m, k, n, dout, true, x, false, dweight, accumulate != 0, nullptr);
        start_sum(m, dbias, accumulate);
        if (dbias) column_sum(n, m, dout, dbias);
        if (dx) Product<T>{blas}(n, k, m, dout, false, weight, false, dx, false, nullptr);
        return DONE;
    });
}
