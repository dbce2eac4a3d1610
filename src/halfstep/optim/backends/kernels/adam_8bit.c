/* AdamW with states of eight bits for processors without AVX-512: group by group what adam_8bit_avx512.c computes.
 *
 * Replicas on mixed machines, and a run that goes on elsewhere, must not part, so every operation here is the one that
 * is there, in its order: tests/optim/test_same_bits_on_every_cpu.py.
 */
#include "adam_8bit.h"

/* A bf16 half and its signed remainder. A negative remainder of a half that is zero (see masters.py) gives NaN, and so is
 * left to the general path. */
ALWAYS float joined(uint16_t half, int16_t remainder) {
    const uint16_t upper = (uint16_t)(half + (remainder < 0 ? 0xFFFFu : 0u));
    return float_of((uint32_t)upper << 16 | (uint16_t)remainder);
}

ALWAYS void load_masters(const struct plan *plan, int64_t begin, float *restrict x) {
    const uint16_t *restrict half = (const uint16_t *)plan->job.parameter + begin;
    if (plan->parameter == HS_FP32) {
        memcpy(x, (const float *)plan->job.parameter + begin, GROUP * sizeof *x);
    } else if (plan->kept == HS_INT16) {
        const int16_t *restrict remainder = (const int16_t *)plan->job.kept + begin;
        for (int i = 0; i < GROUP; i++) x[i] = joined(half[i], remainder[i]);
    } else if (plan->kept == HS_INT8) {
        const int8_t *restrict remainder = (const int8_t *)plan->job.kept + begin;
        for (int i = 0; i < GROUP; i++) x[i] = joined(half[i], (int16_t)(remainder[i] * 256));
    } else {
        for (int i = 0; i < GROUP; i++) x[i] = from_bf16(half[i]);
    }
}

ALWAYS float largest_magnitude(const float *restrict x) {
    uint32_t largest = 0;
    for (int i = 0; i < GROUP; i++) {
        const uint32_t bits = bits_of(x[i]) & MAGNITUDE;
        largest = bits > largest ? bits : largest;
    }
    return float_of(largest);
}

ALWAYS int is_usual(float largest) {
    return largest == 0.0f || (largest >= SMALL && largest < __builtin_inff());
}

/* One whole group; 0 where the general path must do it, and nothing has been stored. */
CLONES static int step_group(const struct plan *plan, const struct drawn_together *with, int64_t begin, int64_t group) {
    float m[GROUP], root[GROUP], x[GROUP];
    int8_t *restrict signed_codes = (int8_t *)plan->job.states[0] + begin;
    uint8_t *restrict square_codes = (uint8_t *)plan->job.states[1] + begin;
    float *scale_m = plan->job.scales[0] + group, *scale_root = plan->job.scales[1] + group;
    const float m_decode = *scale_m * with->m_decode, root_decode = *scale_root * with->root_decode;
    const float weight = with->weight;
    if (plan->gradient == HS_FP32)
        memcpy(m, (const float *)plan->job.gradient + begin, sizeof m);
    else
        for (int i = 0; i < GROUP; i++) m[i] = from_bf16(((const uint16_t *)plan->job.gradient + begin)[i]);
    for (int i = 0; i < GROUP; i++) {
        const float drawn = m[i] * weight;
        const float code = (float)signed_codes[i], square = (float)square_codes[i] * root_decode;
        m[i] = __builtin_fmaf(code * __builtin_fabsf(code), m_decode, drawn);
        root[i] = __builtin_sqrtf(__builtin_fmaf(square, square, drawn * drawn));
    }
    const float largest_m = largest_magnitude(m), largest_root = largest_magnitude(root);
    if (!is_usual(largest_m) || !is_usual(largest_root)) return 0;
    load_masters(plan, begin, x);
    int nan = 0;
    for (int i = 0; i < GROUP; i++) {
        x[i] = x[i] * with->shrink + m[i] / __builtin_fmaf(root[i], with->denominator, with->eps);
        nan |= is_nan(bits_of(x[i]));
    }
    if (nan) return 0;
    const float m_factor = 16129.0f / (largest_m > SMALL ? largest_m : SMALL);
    const float root_factor = 255.0f / (largest_root > SMALL ? largest_root : SMALL);
    const struct stream noise = plan->state_noise[1];
    for (int i = 0; i < GROUP; i++) {
        const float code = __builtin_rintf(__builtin_sqrtf(__builtin_fabsf(m[i]) * m_factor));
        signed_codes[i] = (int8_t)(int32_t)__builtin_copysignf(code > 127.0f ? 127.0f : code, m[i]);
    }
    for (int i = 0; i < GROUP; i++) {
        /* To nearest after a number in [-1/2, 1/2), which is the floor after one in [0, 1). */
        const float drawn = (float)(int32_t)(dither(noise, (uint32_t)begin + (uint32_t)i) + 0x80000000u);
        const float code = __builtin_rintf(__builtin_fmaf(drawn, 0x1p-32f, root[i] * root_factor));
        const float least = root[i] != 0.0f ? 1.0f : 0.0f;
        square_codes[i] = (uint8_t)(int32_t)(code < least ? least : code > 255.0f ? 255.0f : code);
    }
    hs_encode_master(plan, begin, GROUP, x);
    const float true_root = largest_root * with->root_scale;
    *scale_m = largest_m > TINY ? largest_m : TINY;
    *scale_root = true_root > TINY ? true_root : TINY;
    return 1;
}

static void adam(const struct plan *plan, int64_t begin, int64_t count, int64_t group) {
    const struct drawn_together with = draw_together(plan);
    for (const int64_t end = begin + count; begin < end; begin += GROUP, group++) {
        const int64_t here = end - begin < GROUP ? end - begin : GROUP;
        if (here < GROUP || !step_group(plan, &with, begin, group)) plan->rare(plan, begin, here, group);
    }
}

hs_segment hs_adam_8bit(const struct plan *plan) { return is_drawn_together(plan) ? adam : 0; }
