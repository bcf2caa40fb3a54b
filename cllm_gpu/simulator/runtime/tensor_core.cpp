// ldmatrix and mma.sync: the last lane of the warp does the work of all. Layouts by the PTX ISA; the test suite holds
// them against tables written separately.
#include <cstring>

#include "checks.hpp"
#include "runtime.hpp"

namespace {
using sim::Operation;

struct MatrixLoad {
    const void* row;
    unsigned* fragments;
    int count, transposed;
    sim::Site site;
};

void require_whole_warp(unsigned lanes, const char* what, sim::Site site) {
    if (lanes != 0xffffffffu)
        sim::fault("warp mask", site, "%s needs all 32 lanes of a warp, lanes %08x take part", what, lanes);
}

void compute_matrix_load(unsigned lanes, void* const* payloads) {
    const auto load = [&](int lane) -> MatrixLoad& { return *static_cast<MatrixLoad*>(payloads[lane]); };
    require_whole_warp(lanes, "ldmatrix", load(__builtin_ctz(lanes)).site);
    const int count = load(0).count;
    std::uint16_t matrices[4][8][8];
    for (int lane = 0; lane < 8 * count; ++lane) std::memcpy(matrices[lane / 8][lane % 8], load(lane).row, 16);
    for (int lane = 0; lane < 32; ++lane) {
        const int major = lane / 4, minor = 2 * (lane % 4);
        for (int j = 0; j < count; ++j) {
            const auto& m = matrices[j];
            const bool transposed = load(lane).transposed;
            const unsigned low = transposed ? m[minor][major] : m[major][minor];
            const unsigned high = transposed ? m[minor + 1][major] : m[major][minor + 1];
            load(lane).fragments[j] = low | high << 16;
        }
    }
}

struct Product {
    float* d;
    const unsigned* a;
    const unsigned* b;
    const float* c;
    sim::Site site;
};

float half_of(unsigned pair, int which) {
    const unsigned bits = which ? pair & 0xffff0000u : pair << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

/// The products of a row are summed in order in float32; a tensor core sums them in another order and precision.
void compute_product(unsigned lanes, void* const* payloads) {
    const auto lane_of = [&](int lane) -> Product& { return *static_cast<Product*>(payloads[lane]); };
    require_whole_warp(lanes, "mma.sync", lane_of(__builtin_ctz(lanes)).site);
    float a[16][16], b[16][8], d[16][8] = {};
    for (int lane = 0; lane < 32; ++lane) {
        const Product& p = lane_of(lane);
        const int g = lane / 4, t = 2 * (lane % 4);
        for (int h = 0; h < 2; ++h) {
            a[g][t + h] = half_of(p.a[0], h), a[g + 8][t + h] = half_of(p.a[1], h);
            a[g][t + 8 + h] = half_of(p.a[2], h), a[g + 8][t + 8 + h] = half_of(p.a[3], h);
            b[t + h][g] = half_of(p.b[0], h), b[t + 8 + h][g] = half_of(p.b[1], h);
            d[g][t + h] = p.c[h], d[g + 8][t + h] = p.c[2 + h];
        }
    }
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = 2 * (lane % 4);
        for (int h = 0; h < 2; ++h) lane_of(lane).d[h] = d[g][t + h], lane_of(lane).d[2 + h] = d[g + 8][t + h];
    }
}

}  // namespace

extern "C" {

void sim_load_matrix(const void* row, unsigned* fragments, int count, int transposed, sim::Site site) {
    SIM_ENTER;
    if (sim::current->lane() < 8 * count) {
        checks_aligned(row, 16, "the row address of a matrix load", site);
        checks_access(row, 16, false, site);
    }
    MatrixLoad load{row, fragments, count, transposed, site};
    sim::collective(Operation::load_matrix, 0xffffffffu, compute_matrix_load, &load, site);
}

void sim_mma_m16n8k16_bf16(float* d, const unsigned* a, const unsigned* b, const float* c, sim::Site site) {
    SIM_ENTER;
    Product product{d, a, b, c, site};
    sim::collective(Operation::mma, 0xffffffffu, compute_product, &product, site);
}
}
