// The decisions of a training step, on the device: nothing of a step is read by the host before the next one begins.
//
//   add_losses   sums[LOSS] (+)= Σ losses, fp64
//   decide_step  norm = √sums[SQUARED_NORM],  clip = min(1, clip_norm / (norm + 1e-6)), or 1 where clip_norm is 0
//                skip = loss or norm not finite, or norm·clip ≥ largest, or `maximum_skipped` skips in a row already,
//                or what the step computes could reach `limit` (cllm_gpu/optim/bounds.py)
//                t = updates + 1:  step_size = rate / (1 − β1^t),  inverse_correction2 = 1 / (1 − β2^t),
//                decoupled_decay = rate·decay; the second row of numbers is for `other_rate` times the rate
//
// losses (count) fp32; sums (2) fp64; rate (1) fp64; counts (2): updates, skips in a row; numbers (2, 3) fp32 as
// adam.cu reads them; draw (1): updates before this one, for stochastic rounding; outcome (1) fp64, for the host:
// 0 applied, 1 skipped, 2 skipped for `limit`; moved (2) fp64: Σ update² of the step before; norms (2) fp64: bounds on
// the norms of weights and first moment.
// Work: one block adds up the losses in a fixed order; one thread decides. Deterministic.
// The arithmetic is that of cllm_gpu/optim/optimizer.py in fp64, rounded to fp32 at the end.
#include "storage.cuh"
#include "step_numbers.cuh"

constexpr int STEP_THREADS = 256;
constexpr double LARGEST_DOUBLE = 1.7976931348623157e308;
enum Sum { LOSS, SQUARED_NORM };
enum Count { UPDATES, SKIPPED_IN_A_ROW };
enum Norm { WEIGHTS, MOMENT };
enum { NUMBERS = 3 };  // in a row of `numbers`

extern "C" __global__ void __launch_bounds__(STEP_THREADS) ENTRY(add_losses)(
    const float* losses, double* sums, int count, int accumulate) {
    __shared__ double exchange[STEP_THREADS];
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += STEP_THREADS) sum += losses[i];
    exchange[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    double total = accumulate ? sums[LOSS] : 0.0;
    for (int i = 0; i < STEP_THREADS; i++) total += exchange[i];
    sums[LOSS] = total;
}

extern "C" __global__ void __launch_bounds__(1) ENTRY(decide_step)(
    const double* sums, const double* rate, int* counts, float* numbers, float* clip, int* skip, unsigned* draw,
    double* outcome, const double* moved, double* norms, double beta1, double beta2, double decay, double other_rate,
    double clip_norm, double largest, double limit, double carry, double gain, double amplification,
    double coupled_decay, int maximum_skipped) {
    const double norm = sqrt(sums[SQUARED_NORM]);
    const double factor = clip_norm > 0.0 ? fmin(1.0, clip_norm / (norm + 1e-6)) : 1.0;
    const bool sound =
        fabs(sums[LOSS]) <= LARGEST_DOUBLE && norm * factor < largest && counts[SKIPPED_IN_A_ROW] < maximum_skipped;
    const int updates = counts[UPDATES];
    const double correction1 = 1.0 - pow(beta1, double(updates + 1));
    const double correction2 = 1.0 - pow(beta2, double(updates + 1));
    if (*outcome == 0.0) norms[WEIGHTS] += sqrt(moved[0] + moved[1]);
    const double weights = norms[WEIGHTS], fastest = *rate * fmax(1.0, other_rate), step_size = fastest / correction1;
    const double pull = norm * factor + coupled_decay * weights;  // on the moments
    const double moment = carry * norms[MOMENT] + gain * pull;
    const double reached = weights + step_size * (moment * amplification) + fastest * decay * weights;
    const bool bounded = step_size < limit && moment * amplification < limit && reached < limit &&
                         (coupled_decay == 0.0 || pull * pull < limit);
    const bool applied = sound && bounded;
    if (applied) norms[MOMENT] = moment;
    *draw = updates;
    *clip = float(factor);
    *skip = !applied;
    *outcome = !sound ? 1.0 : !bounded ? 2.0 : 0.0;
    counts[UPDATES] = updates + applied;
    counts[SKIPPED_IN_A_ROW] = applied ? 0 : counts[SKIPPED_IN_A_ROW] + 1;
    for (int row = 0; row < 2; row++) {
        const double own = row == 0 ? *rate : *rate * other_rate;
        float* const out = numbers + row * NUMBERS;
        out[STEP_SIZE] = float(own / correction1);
        out[INVERSE_CORRECTION2] = float(1.0 / correction2);
        out[DECOUPLED_DECAY] = float(own * decay);
    }
}
