// Votes, shuffles and reductions: each lane hands in a payload, the last lane fills in all results.
#include "checks.hpp"
#include "runtime.hpp"

namespace {
using sim::Operation;

struct Shuffle {
    unsigned long long bits, result;
    int kind, operand, width;
    sim::Site site;
};

/// The lane that `lane` reads from, by the CUDA programming guide's rules for __shfl_*_sync; `lane` itself out of
/// range.
int source_lane(const Shuffle& request, int lane) {
    const int width = request.width;
    const int base = lane & ~(width - 1);
    int source = lane;
    switch (request.kind) {
        case 0: return base | (request.operand & (width - 1));
        case 1: source = lane - request.operand; return source < base ? lane : source;
        case 2: source = lane + request.operand; return source >= base + width ? lane : source;
        default: source = lane ^ request.operand; return source >= base + width ? lane : source;
    }
}

void compute_shuffle(unsigned lanes, void* const* payloads) {
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        auto& request = *static_cast<Shuffle*>(payloads[lane]);
        const int source = source_lane(request, lane);
        if (source < 32 && (lanes >> source & 1)) {
            request.result = static_cast<Shuffle*>(payloads[source])->bits;
        } else {
            request.result = ~0ull;
            checks_shuffle_source(lane, source, request.site);
        }
    }
}

struct Vote {
    unsigned long long value;
    int kind;
    unsigned result;
};

void compute_vote(unsigned lanes, void* const* payloads) {
    unsigned ballot = 0;
    bool all_equal = true;
    const auto first = static_cast<Vote*>(payloads[__builtin_ctz(lanes)])->value;
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        const auto value = static_cast<Vote*>(payloads[lane])->value;
        if (value) ballot |= 1u << lane;
        all_equal = all_equal && value == first;
    }
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
        auto& vote = *static_cast<Vote*>(payloads[__builtin_ctz(rest)]);
        if (vote.kind == 0) vote.result = ballot;
        if (vote.kind == 2) vote.result = all_equal ? lanes : 0;
        if (vote.kind != 1) continue;
        vote.result = 0;
        for (unsigned other = lanes; other; other &= other - 1) {
            const int lane = __builtin_ctz(other);
            if (static_cast<Vote*>(payloads[lane])->value == vote.value) vote.result |= 1u << lane;
        }
    }
}

struct Reduce {
    unsigned value;
    int kind, is_signed;
};

unsigned combine(const Reduce& how, unsigned a, unsigned b) {
    const bool less = how.is_signed ? static_cast<int>(a) < static_cast<int>(b) : a < b;
    switch (how.kind) {
        case 0: return a + b;
        case 1: return less ? a : b;
        case 2: return less ? b : a;
        case 3: return a & b;
        case 4: return a | b;
        default: return a ^ b;
    }
}

void compute_reduce(unsigned lanes, void* const* payloads) {
    const auto& how = *static_cast<Reduce*>(payloads[__builtin_ctz(lanes)]);
    unsigned total = how.value;
    for (unsigned rest = lanes & (lanes - 1); rest; rest &= rest - 1)
        total = combine(how, total, static_cast<Reduce*>(payloads[__builtin_ctz(rest)])->value);
    for (unsigned rest = lanes; rest; rest &= rest - 1)
        static_cast<Reduce*>(payloads[__builtin_ctz(rest)])->value = total;
}
}  // namespace

extern "C" {

unsigned long long sim_shuffle(int kind, unsigned mask, unsigned long long bits, int operand, int width,
                               sim::Site site) {
    SIM_ENTER;
    if (width < 1 || width > 32 || (width & (width - 1)))
        sim::fault("warp mask", site, "a shuffle's width is %d; it must be 1, 2, 4, 8, 16 or 32", width);
    Shuffle request{bits, 0, kind, operand, width, site};
    sim::collective(Operation::shuffle, mask, compute_shuffle, &request, site);
    return request.result;
}

unsigned sim_vote(int kind, unsigned mask, unsigned long long value, sim::Site site) {
    SIM_ENTER;
    Vote vote{value, kind, 0};
    sim::collective(Operation::vote, mask, compute_vote, &vote, site);
    return vote.result;
}

unsigned sim_warp_reduce(int kind, int is_signed, unsigned mask, unsigned value, sim::Site site) {
    SIM_ENTER;
    Reduce request{value, kind, is_signed};
    sim::collective(Operation::reduce, mask, compute_reduce, &request, site);
    return request.value;
}

unsigned sim_active_mask(sim::Site site) {
    SIM_ENTER;
    unsigned result = 0;
    sim::collective(Operation::active_mask, 0xffffffffu, nullptr, &result, site);
    return result;
}

void sim_warp_barrier(unsigned mask, sim::Site site) {
    SIM_ENTER;
    sim::collective(Operation::barrier, mask, checks_warp_barrier, nullptr, site);
}
}
