// Inverted dropout: out = x·keep / (1 − rate), the mask drawn from Philox by element index and never stored.
//
//   keep = word(first_element + i) >= threshold,  threshold = round(rate·2³²),  scale = 1 / (1 − rate)
//
// x, out (n) real; out may be x. The backward is the same map.
// Work: a thread takes the four elements of one Philox evaluation; 256 threads a block.
// Traffic per element: 1 read, 1 write; 10 rounds of Philox per 4 elements.
// Deterministic: the same bits as the reference for float. Source: Srivastava et al. 2014; Salmon et al. 2011.
// Resources, the most over all variants and sm_80, sm_90, sm_100 (bench/kernel_resources.py writes this table):
//   kernel                                     registers  shared  spilled
//   dropout_bfloat16                                  26       0        0
//   dropout_float32                                   26       0        0
#include "philox.cuh"
#include "storage.cuh"

extern "C" __global__ void __launch_bounds__(256) ENTRY(dropout)(
    const real* x, real* out, long long size, unsigned long long first_element, unsigned long long seed,
    const unsigned* step, unsigned site, unsigned threshold, float scale) {
    const u64 group = first_element / 4 + u64(blockIdx.x) * blockDim.x + threadIdx.x;
    PhiloxWords words(seed, step, site);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const index_t at = index_t(group * 4 + i) - index_t(first_element);
        if (at < 0 || at >= size) continue;
        const float mask = words.at(group * 4 + i) >= threshold ? scale : 0.0f;
        store(out + at, __fmul_rn(to_float(x[at]), mask));
    }
}
