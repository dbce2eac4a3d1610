/* AdamW in one loop for what is stored most often: no scratch, every number read and written once.
 *
 * The bits are those of the general path; constant arguments make one loop of each combination.
 */
#include "plan.h"

/* Every NaN of x gets the canonical pattern before its bits are split. */
ALWAYS void split_bf16(float x, uint16_t *half, int16_t *remainder) {
    const uint32_t bits = canonical(bits_of(x));
    const uint32_t upper = (bits + 0x8000u) >> 16;
    *half = (uint16_t)upper;
    *remainder = (int16_t)(uint16_t)bits; /* bits - (upper << 16), of which the lower half is all there is */
}

ALWAYS float joined_bf16(uint16_t half, int16_t remainder) {
    const uint32_t upper = (uint32_t)half << 16;
    const uint32_t bits = upper + (uint32_t)(int32_t)remainder;
    return float_of((int32_t)(bits ^ upper) < 0 ? upper : bits);
}

ALWAYS float unit_fp16(uint16_t half, int sign) {
    const int field = (half >> 10) & 0x1F;
    return float_of((uint32_t)(127 + sign * (field - 39)) << 23);
}

ALWAYS void split_fp16(float x, uint16_t *half, int16_t *remainder) {
    *half = to_fp16(x);
    const float lost = x - from_fp16(*half);
    const float difference = is_finite(bits_of(lost)) ? lost : 0.0f;
    *remainder = (int16_t)(int32_t)__builtin_rintf(difference * unit_fp16(*half, -1));
}

ALWAYS float joined_fp16(uint16_t half, int16_t remainder) {
    return from_fp16(half) + (float)remainder * unit_fp16(half, 1);
}

ALWAYS void adam(const struct plan *plan, int64_t begin, int64_t count, enum hs_format parameter,
                 enum hs_format state) {
    float *restrict whole = (float *)plan->job.parameter + begin;
    uint16_t *restrict half = (uint16_t *)plan->job.parameter + begin;
    int16_t *restrict remainder = (int16_t *)plan->job.kept + (parameter == HS_FP32 ? 0 : begin);
    const float *restrict gradient = (const float *)plan->job.gradient + begin;
    const uint16_t *restrict half_gradient = (const uint16_t *)plan->job.gradient + begin;
    float *restrict exp_avg = (float *)plan->job.states[0] + begin;
    float *restrict exp_avg_sq = (float *)plan->job.states[1] + begin;
    uint16_t *restrict half_avg = (uint16_t *)plan->job.states[0] + begin;
    uint16_t *restrict half_avg_sq = (uint16_t *)plan->job.states[1] + begin;
    const float coefficient = plan->coefficient, shrink = plan->shrink, weight = plan->first.weight;
    const float beta2 = plan->beta2, one_minus_beta2 = plan->one_minus_beta2;
    const float root = plan->root, eps = plan->eps, size = plan->minus_size;
    const struct stream noise = plan->state_noise[1];
    for (int64_t i = 0; i < count; i++) {
        const float g = coefficient * (parameter == HS_FP32   ? gradient[i]
                                       : parameter == HS_BF16 ? from_bf16(half_gradient[i])
                                                              : from_fp16(half_gradient[i]));
        const float x = parameter == HS_FP32   ? whole[i]
                        : parameter == HS_BF16 ? joined_bf16(half[i], remainder[i])
                                               : joined_fp16(half[i], remainder[i]);
        float m = state == HS_FP32 ? exp_avg[i] : from_bf16(half_avg[i]);
        float v = state == HS_FP32 ? exp_avg_sq[i] : from_bf16(half_avg_sq[i]);
        m = __builtin_fmaf(weight, g - m, m);
        v = __builtin_fmaf(one_minus_beta2 * g, g, beta2 * v);
        const float denominator = __builtin_sqrtf(v) / root + eps;
        const float moved = x * shrink + size * m / denominator;
        if (state == HS_FP32) {
            exp_avg[i] = m;
            exp_avg_sq[i] = v;
        } else {
            const uint32_t bits = canonical(bits_of(v));
            const uint32_t drawn = dither(noise, (uint32_t)(begin + i)) >> 16;
            half_avg[i] = to_bf16(m);
            half_avg_sq[i] = (uint16_t)((is_finite(bits) ? bits + drawn : bits) >> 16);
        }
        if (parameter == HS_FP32)
            whole[i] = moved;
        else if (parameter == HS_BF16)
            split_bf16(moved, &half[i], &remainder[i]);
        else
            split_fp16(moved, &half[i], &remainder[i]);
    }
}

#define LOOP(name, parameter, state)                                                                \
    CLONES static void name(const struct plan *plan, int64_t begin, int64_t count, int64_t group) { \
        (void)group;                                                                                \
        adam(plan, begin, count, parameter, state);                                                 \
    }

LOOP(fp32_fp32, HS_FP32, HS_FP32)
LOOP(fp32_bf16, HS_FP32, HS_BF16)
LOOP(bf16_fp32, HS_BF16, HS_FP32)
LOOP(bf16_bf16, HS_BF16, HS_BF16)
LOOP(fp16_fp32, HS_FP16, HS_FP32)
LOOP(fp16_bf16, HS_FP16, HS_BF16)

hs_segment hs_fused_adam(const struct plan *plan) {
    const enum hs_format parameter = plan->parameter, state = plan->states[0];
    if (plan->kind != HS_ADAM || plan->amsgrad || plan->decay != 0.0f || plan->first.from_end) return 0;
    if (plan->gradient != parameter || plan->states[1] != state) return 0;
    if (parameter != HS_FP32 && plan->kept != HS_INT16) return 0;
    if (state != HS_FP32 && state != HS_BF16) return 0;
    const int wide = state == HS_FP32;
    if (parameter == HS_FP32) return wide ? fp32_fp32 : fp32_bf16;
    if (parameter == HS_BF16) return wide ? bf16_fp32 : bf16_bf16;
    return wide ? fp16_fp32 : fp16_bf16;
}
