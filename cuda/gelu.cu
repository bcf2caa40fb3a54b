// GELU in its tanh form, with the bias of the linear map before it.
//
//   forward    h = x + bias (kept in x),  u = √(2/π)·(h + 0.044715·h³),  out = ½·h·(1 + tanh u)
//   backward   dx = dout·[½·(1 + t) + ½·h·(1 − t²)·√(2/π)·(1 + 3·0.044715·h²)],  t = tanh u;  dbias = Σ_rows dx:
//              partial sums here, finished by column_sum_finish
//
// x, out, dout, dx (N, M) real; bias (M) real or null; partials (chunks, M) fp32 or null. dx may be dout.
// Work: see columns.cuh. Traffic per element: forward 1 read, 2 writes (1 without bias); backward 2 reads, 1 write.
// Deterministic. Source: Hendrycks & Gimpel 2016, "Gaussian error linear units".
#include "columns.cuh"

constexpr float SCALE = 0.7978845608028654f;  // √(2/π)
constexpr float CUBIC = 0.044715f;

// fp32 storage asks for tanh to the last bits; in bf16 an absolute error of 1e-6 is far below rounding.
__device__ __forceinline__ float tanh_of(float u) {
#ifdef CLLM_BF16
    return 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * u));
#else
    return tanhf(u);
#endif
}

template <int W>
__device__ __forceinline__ void forward(real* x, const real* bias, real* out, index_t rows, int columns,
                                        int chunk_rows) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = (blockIdx.x * 32 + lane) * W;
    if (column >= columns) return;
    Pack<W> b = {};
    if (bias != nullptr) b = load_pack<W>(bias + column);
    const index_t begin = index_t(blockIdx.y) * chunk_rows;
    const index_t end = begin + chunk_rows < rows ? begin + chunk_rows : rows;
    for (index_t row = begin + warp; row < end; row += COLUMN_WARPS) {
        const index_t at = row * columns + column;
        Pack<W> h = load_pack<W>(x + at), y;
#pragma unroll
        for (int i = 0; i < W; i++) {
            h.v[i] = round_to_real(h.v[i] + b.v[i]);
            const float t = tanh_of(h.v[i] * (SCALE + SCALE * CUBIC * h.v[i] * h.v[i]));
            y.v[i] = 0.5f * h.v[i] * (1.0f + t);
        }
        if (bias != nullptr) store_pack<W>(x + at, h);
        store_pack<W>(out + at, y);
    }
}

extern "C" __global__ void __launch_bounds__(256) ENTRY(gelu_forward)(
    real* x, const real* bias, real* out, long long rows, int columns, int chunk_rows, int wide) {
    if (wide)
        forward<WIDE<real>>(x, bias, out, rows, columns, chunk_rows);
    else
        forward<1>(x, bias, out, rows, columns, chunk_rows);
}

// dx of one pack, written and returned.
template <int W>
__device__ __forceinline__ Pack<W> backward(const real* dout, const real* x, real* dx, index_t at) {
    const Pack<W> h = load_pack<W>(x + at);
    Pack<W> g = load_pack<W>(dout + at);
#pragma unroll
    for (int i = 0; i < W; i++) {
        const float square = h.v[i] * h.v[i];
        const float t = tanh_of(h.v[i] * (SCALE + SCALE * CUBIC * square));
        const float slope = (1.0f - t * t) * h.v[i] * (SCALE + 3.0f * SCALE * CUBIC * square);
        g.v[i] *= 0.5f * (1.0f + t + slope);
    }
    store_pack<W>(dx + at, g);
    return g;
}

extern "C" __global__ void __launch_bounds__(256) ENTRY(gelu_backward)(
    const real* dout, const real* x, real* dx, float* partials, long long rows, int columns, int chunk_rows, int wide) {
    __shared__ float staging[COLUMN_WARPS * 32 * WIDE<real>];
    if (wide)
        column_partials<WIDE<real>>(
            [&](index_t row, int column) { return backward<WIDE<real>>(dout, x, dx, row * columns + column); },
            partials, rows, columns, chunk_rows, staging);
    else
        column_partials<1>([&](index_t row, int column) { return backward<1>(dout, x, dx, row * columns + column); },
                           partials, rows, columns, chunk_rows, staging);
}
