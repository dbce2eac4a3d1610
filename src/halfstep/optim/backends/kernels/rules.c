/* Adam, SGD and Lion on FP32 blocks: halfstep/optim/rules.py, in its order and with torch's roundings.
 *
 * torch's lerp, add with a factor and addcmul round once (fused multiply-add) where the last product meets the sum,
 * its addcdiv does not; compiled with contraction off, what is written here is what is computed.
 */
#include "plan.h"

static inline __attribute__((always_inline)) void adam(const struct plan *plan, int count, float *restrict x,
                                                       float *restrict g, float *restrict exp_avg,
                                                       float *restrict exp_avg_sq, float *restrict ever) {
    const struct lerp first = plan->first;
    const float beta2 = plan->beta2, one_minus_beta2 = plan->one_minus_beta2;
    const float root = plan->root, eps = plan->eps, size = plan->minus_size, shrink = plan->shrink;
    if (plan->decay != 0.0f)
        for (int i = 0; i < count; i++) g[i] = __builtin_fmaf(plan->decay, x[i], g[i]);
    for (int i = 0; i < count; i++) {
        exp_avg[i] = lerp(first, exp_avg[i], g[i]);
        exp_avg_sq[i] = __builtin_fmaf(one_minus_beta2 * g[i], g[i], beta2 * exp_avg_sq[i]);
    }
    const float *squares = exp_avg_sq;
    if (plan->amsgrad) {
        for (int i = 0; i < count; i++) /* a NaN on either side stays */
            ever[i] = ever[i] > exp_avg_sq[i] || ever[i] != ever[i] ? ever[i] : exp_avg_sq[i];
        squares = ever;
    }
    for (int i = 0; i < count; i++) {
        const float denominator = __builtin_sqrtf(squares[i]) / root + eps;
        x[i] = x[i] * shrink + size * exp_avg[i] / denominator;
    }
}

static inline __attribute__((always_inline)) void sgd(const struct plan *plan, int count, float *restrict x,
                                                      float *restrict g, float *restrict buffer) {
    const float momentum = plan->momentum, undamped = plan->undamped, size = plan->minus_size;
    if (plan->decay != 0.0f)
        for (int i = 0; i < count; i++) g[i] = __builtin_fmaf(plan->decay, x[i], g[i]);
    if (buffer) {
        if (plan->first_step)
            memcpy(buffer, g, (size_t)count * sizeof *g);
        else
            for (int i = 0; i < count; i++) buffer[i] = __builtin_fmaf(undamped, g[i], buffer[i] * momentum);
        if (plan->nesterov)
            for (int i = 0; i < count; i++) g[i] = __builtin_fmaf(momentum, buffer[i], g[i]);
        else
            memcpy(g, buffer, (size_t)count * sizeof *g);
    }
    for (int i = 0; i < count; i++) x[i] = __builtin_fmaf(size, g[i], x[i]);
}

static inline __attribute__((always_inline)) void lion(const struct plan *plan, int count, float *restrict x,
                                                       const float *restrict g, float *restrict exp_avg) {
    const struct lerp first = plan->first, second = plan->second;
    const float size = plan->minus_size, shrink = plan->shrink;
    for (int i = 0; i < count; i++) {
        const float direction = lerp(first, exp_avg[i], g[i]);
        const float sign = (float)((direction > 0.0f) - (direction < 0.0f)); /* of NaN 0, as in torch */
        x[i] = __builtin_fmaf(size, sign, x[i] * shrink);
        exp_avg[i] = lerp(second, exp_avg[i], g[i]);
    }
}

CLONES void hs_apply(const struct plan *plan, int count, float *x, float *g, float *const states[HS_STATES]) {
    if (plan->kind == HS_ADAM)
        adam(plan, count, x, g, states[0], states[1], states[2]);
    else if (plan->kind == HS_SGD)
        sgd(plan, count, x, g, states[0]);
    else
        lion(plan, count, x, g, states[0]);
}
