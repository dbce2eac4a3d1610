/* Optimizer states to FP32 and back: halfstep/optim/moments.py, block by block.
 *
 * A block begins at the beginning of a group and holds whole groups, but for the last of a row.
 */
#include "plan.h"

#define TINY 0x1p-126f

CLONES static void decode_signed(const int8_t *restrict codes, float scale, int count, float *restrict state) {
    for (int i = 0; i < count; i++) {
        const float root = (float)codes[i] / 127.0f;
        state[i] = root * __builtin_fabsf(root) * scale;
    }
}

CLONES static void decode_square(const uint8_t *restrict codes, float scale, int count, float *restrict state) {
    const float spacing = scale / 255.0f;
    for (int i = 0; i < count; i++) {
        const float root = (float)codes[i] * spacing;
        state[i] = root * root;
    }
}

CLONES void hs_decode_state(const struct plan *plan, int which, int64_t begin, int count, int64_t group,
                            float *restrict state) {
    const enum hs_format format = plan->states[which];
    const void *data = plan->job.states[which];
    if (format == HS_FP32) {
        memcpy(state, (const float *)data + begin, (size_t)count * sizeof *state);
    } else if (format == HS_BF16) {
        const uint16_t *restrict from = (const uint16_t *)data + begin;
        for (int i = 0; i < count; i++) state[i] = from_bf16(from[i]);
    } else {
        const float *scales = plan->job.scales[which] + group;
        for (int i = 0; i < count; i += GROUP, scales++) {
            const int length = count - i < GROUP ? count - i : GROUP;
            if (format == HS_INT8)
                decode_signed((const int8_t *)data + begin + i, *scales, length, state + i);
            else
                decode_square((const uint8_t *)data + begin + i, *scales, length, state + i);
        }
    }
}

/* The largest of a group's roots, at least TINY; NaN where one is NaN: as integers, NaN is beyond every number. */
ALWAYS float largest_of(const float *restrict roots, int count) {
    int32_t largest = (int32_t)bits_of(TINY);
    for (int i = 0; i < count; i++) {
        const int32_t bits = (int32_t)(bits_of(roots[i]) & MAGNITUDE);
        largest = bits > largest ? bits : largest;
    }
    return float_of((uint32_t)largest);
}

CLONES static float encode_signed(const float *restrict state, int count, int8_t *restrict codes) {
    const float largest = largest_of(state, count);
    const float inverse = 1.0f / largest;
    for (int i = 0; i < count; i++) {
        const float relative = __builtin_fabsf(state[i]) * inverse;
        float code = __builtin_rintf(__builtin_sqrtf(relative) * 127.0f);
        code = code != code ? 0.0f : code;
        codes[i] = (int8_t)(int32_t)__builtin_copysignf(code, state[i]);
    }
    return largest;
}

CLONES static float encode_square(const float *restrict state, int count, uint8_t *restrict codes,
                                  struct stream noise, uint32_t begin) {
    float roots[GROUP];
    for (int i = 0; i < count; i++) roots[i] = __builtin_sqrtf(state[i]);
    const float largest = largest_of(roots, count);
    const float inverse = 1.0f / largest;
    for (int i = 0; i < count; i++) {
        float code = __builtin_floorf(roots[i] * inverse * 255.0f + uniform(dither(noise, begin + (uint32_t)i)));
        code = code != code ? 0.0f : code;
        code = code > 255.0f ? 255.0f : code;
        code = state[i] > 0.0f && code < 1.0f ? 1.0f : code;
        codes[i] = (uint8_t)(int32_t)code;
    }
    return largest;
}

CLONES static void encode_bf16(const float *restrict state, int count, uint16_t *restrict to) {
    for (int i = 0; i < count; i++) to[i] = to_bf16(state[i]);
}

CLONES static void encode_bf16_dithered(const float *restrict state, int count, uint16_t *restrict to,
                                        struct stream noise, uint32_t begin) {
    for (int i = 0; i < count; i++) {
        const uint32_t bits = canonical(bits_of(state[i]));
        const uint32_t drawn = dither(noise, begin + (uint32_t)i);
        to[i] = (uint16_t)((is_finite(bits) ? bits + (drawn >> 16) : bits) >> 16);
    }
}

void hs_encode_state(const struct plan *plan, int which, int64_t begin, int count, int64_t group,
                     const float *restrict state) {
    const enum hs_format format = plan->states[which];
    void *data = plan->job.states[which];
    const struct stream noise = plan->state_noise[which];
    const int square = plan->kind == HS_ADAM && which > 0;
    if (format == HS_FP32) {
        memcpy((float *)data + begin, state, (size_t)count * sizeof *state);
    } else if (format == HS_BF16) {
        if (square)
            encode_bf16_dithered(state, count, (uint16_t *)data + begin, noise, (uint32_t)begin);
        else
            encode_bf16(state, count, (uint16_t *)data + begin);
    } else {
        float *scales = plan->job.scales[which] + group;
        for (int i = 0; i < count; i += GROUP, scales++) {
            const int length = count - i < GROUP ? count - i : GROUP;
            if (square)
                *scales = encode_square(state + i, length, (uint8_t *)data + begin + i, noise, (uint32_t)(begin + i));
            else
                *scales = encode_signed(state + i, length, (int8_t *)data + begin + i);
        }
    }
}
