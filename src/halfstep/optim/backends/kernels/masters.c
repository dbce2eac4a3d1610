/* FP32 masters from a parameter and what is kept beside it, and back: halfstep/optim/masters.py, block by block. */
#include "plan.h"

/* 2^(field of an fp16 number - 39), or for eight bits 2^(max(field, 1) - 33): what one count of a remainder means.
 * `sign` -1 gives the reciprocal. */
ALWAYS float unit(uint16_t half, int eight, int sign) {
    int field = (half >> 10) & 0x1F;
    field = eight && field < 1 ? 1 : field;
    return float_of((uint32_t)(127 + sign * (field - (eight ? 33 : 39))) << 23);
}

/* The bits above and the remainder below; where that leads across zero the parameter alone (see masters.py). */
ALWAYS float joined_bf16(uint16_t half, uint32_t remainder) {
    const uint32_t upper = (uint32_t)half << 16;
    const uint32_t bits = upper + remainder;
    return float_of((int32_t)(bits ^ upper) < 0 ? upper : bits);
}

/* One up from the floor with the chance that makes the mean x. */
ALWAYS float floor_or_above(float x, uint32_t noise) {
    const float below = __builtin_floorf(x);
    return below + (uniform(noise) < x - below ? 1.0f : 0.0f);
}

CLONES void hs_decode_gradient(const struct plan *plan, int64_t begin, int count, float *restrict g) {
    const float coefficient = plan->coefficient;
    if (plan->gradient == HS_FP32) {
        const float *restrict from = (const float *)plan->job.gradient + begin;
        for (int i = 0; i < count; i++) g[i] = from[i] * coefficient;
    } else if (plan->gradient == HS_BF16) {
        const uint16_t *restrict from = (const uint16_t *)plan->job.gradient + begin;
        for (int i = 0; i < count; i++) g[i] = from_bf16(from[i]) * coefficient;
    } else {
        const uint16_t *restrict from = (const uint16_t *)plan->job.gradient + begin;
        for (int i = 0; i < count; i++) g[i] = from_fp16(from[i]) * coefficient;
    }
}

/* bf16 beside `kept`, in every way that it can be kept; and fp16 below. Constant arguments make one loop of each. */
ALWAYS void decode_half(const struct plan *plan, int64_t begin, int count, float *restrict x, int bf16,
                        enum hs_format kept) {
    const uint16_t *restrict parameter = (const uint16_t *)plan->job.parameter + begin;
    const float *restrict whole = (const float *)plan->job.kept + (kept == HS_FP32 ? begin : 0);
    const int16_t *restrict wide = (const int16_t *)plan->job.kept + (kept == HS_FP32 ? 0 : begin);
    const int8_t *restrict narrow = (const int8_t *)plan->job.kept + begin;
    for (int i = 0; i < count; i++) {
        const uint16_t half = parameter[i];
        const float near = bf16 ? from_bf16(half) : from_fp16(half);
        if (kept == HS_ABSENT) {
            x[i] = near;
        } else if (kept == HS_FP32) {
            const float rounded = bf16 ? from_bf16(to_bf16(whole[i])) : from_fp16(to_fp16(whole[i]));
            x[i] = rounded == near ? whole[i] : near;
        } else if (kept == HS_INT16 || kept == HS_INT8) {
            const int eight = kept == HS_INT8;
            const int32_t remainder = eight ? narrow[i] : wide[i];
            x[i] = bf16 ? joined_bf16(half, (uint32_t)remainder << (eight ? 8 : 0))
                        : near + (float)remainder * unit(half, eight, 1);
        } else {
            const uint16_t kept_error = (uint16_t)wide[i];
            const float error = bf16 ? from_bf16(kept_error) : from_fp16(kept_error);
            /* More than a rounding error can be: the parameter was written from outside. */
            const int rounding = __builtin_fabsf(error) <= __builtin_fabsf(near) * (bf16 ? 0x1p-8f : 0x1p-11f);
            x[i] = rounding ? near + error : near;
        }
    }
}

ALWAYS void decode_any(const struct plan *plan, int64_t begin, int count, float *x, int bf16) {
    switch (plan->kept) {
    case HS_ABSENT: decode_half(plan, begin, count, x, bf16, HS_ABSENT); break;
    case HS_FP32: decode_half(plan, begin, count, x, bf16, HS_FP32); break;
    case HS_INT16: decode_half(plan, begin, count, x, bf16, HS_INT16); break;
    case HS_INT8: decode_half(plan, begin, count, x, bf16, HS_INT8); break;
    default: decode_half(plan, begin, count, x, bf16, HS_BF16); break;
    }
}

CLONES void hs_decode_master(const struct plan *plan, int64_t begin, int count, float *x) {
    if (plan->parameter == HS_FP32)
        memcpy(x, (const float *)plan->job.parameter + begin, (size_t)count * sizeof *x);
    else if (plan->parameter == HS_BF16)
        decode_any(plan, begin, count, x, 1);
    else
        decode_any(plan, begin, count, x, 0);
}

/* x with what bf16 drops rounded away from zero where the dither says so. */
ALWAYS uint16_t dithered_bf16(float x, uint32_t noise) {
    const uint32_t bits = canonical(bits_of(x));
    return (uint16_t)((is_finite(bits) ? bits + (noise >> 16) : bits) >> 16);
}

/* The same in fp16, whose spacing stays 2^-24 below 2^-14, and where what is finite stays finite up to 65520. */
ALWAYS uint16_t dithered_fp16(float x, uint32_t noise) {
    const uint32_t bits = canonical(bits_of(x));
    float normal = float_of((bits + (noise >> 19)) & ~0x1FFFu);
    normal = normal > 65504.0f ? 65504.0f : normal < -65504.0f ? -65504.0f : normal;
    const float magnitude = float_of(bits & MAGNITUDE);
    const float small = floor_or_above(magnitude * 0x1p24f, noise) * 0x1p-24f;
    const float signed_small = float_of(bits_of(small) | (bits & SIGN));
    return to_fp16(magnitude < 0x1p-14f ? signed_small : magnitude < 65520.0f ? normal : x);
}

ALWAYS void encode_half(const struct plan *plan, int64_t begin, int count, const float *restrict from, int bf16,
                        enum hs_format kept, int dithered) {
    uint16_t *restrict parameter = (uint16_t *)plan->job.parameter + begin;
    float *restrict whole = (float *)plan->job.kept + (kept == HS_FP32 ? begin : 0);
    int16_t *restrict wide = (int16_t *)plan->job.kept + (kept == HS_FP32 ? 0 : begin);
    int8_t *restrict narrow = (int8_t *)plan->job.kept + begin;
    const struct stream noise = plan->weight_noise;
    for (int i = 0; i < count; i++) {
        const float x = from[i];
        const uint32_t bits = bits_of(x);
        const uint32_t drawn = dithered ? dither(noise, (uint32_t)(begin + i)) : 0;
        if (kept == HS_ABSENT && dithered) {
            parameter[i] = bf16 ? dithered_bf16(x, drawn) : dithered_fp16(x, drawn);
        } else if (kept == HS_INT16 && bf16) {
            const uint32_t whole_bits = canonical(bits);
            const uint32_t upper = (whole_bits + 0x8000u) >> 16;
            parameter[i] = (uint16_t)upper;
            wide[i] = (int16_t)(uint16_t)(whole_bits - (upper << 16));
        } else if (kept == HS_INT8 && bf16) {
            const uint32_t whole_bits = canonical(bits);
            const uint32_t added = dithered ? drawn >> 24 : 0x80u;
            const uint32_t cut = (is_finite(whole_bits) ? whole_bits + added : whole_bits) & ~0xFFu;
            const uint32_t upper = (cut + 0x8000u) >> 16;
            parameter[i] = (uint16_t)upper;
            narrow[i] = (int8_t)(uint8_t)((cut - (upper << 16)) >> 8);
        } else {
            const uint16_t half = bf16 ? to_bf16(x) : to_fp16(x);
            parameter[i] = half;
            const float lost = x - (bf16 ? from_bf16(half) : from_fp16(half));
            const float difference = is_finite(bits_of(lost)) ? lost : 0.0f;
            if (kept == HS_FP32) whole[i] = x;
            if (kept == HS_INT16 || kept == HS_INT8) {
                const int eight = kept == HS_INT8;
                const float units = difference * unit(half, eight, -1);
                float count_of = eight && dithered ? floor_or_above(units, drawn) : __builtin_rintf(units);
                if (eight) {
                    count_of = count_of > 127.0f ? 127.0f : count_of < -127.0f ? -127.0f : count_of;
                    narrow[i] = (int8_t)(int32_t)count_of;
                } else {
                    wide[i] = (int16_t)(int32_t)count_of;
                }
            }
            if (kept == HS_BF16) wide[i] = (int16_t)(bf16 ? to_bf16(difference) : to_fp16(difference));
        }
    }
}

ALWAYS void encode_any(const struct plan *plan, int64_t begin, int count, const float *x, int bf16) {
    switch (plan->kept) {
    case HS_ABSENT:
        if (plan->dithered)
            encode_half(plan, begin, count, x, bf16, HS_ABSENT, 1);
        else
            encode_half(plan, begin, count, x, bf16, HS_ABSENT, 0);
        break;
    case HS_FP32: encode_half(plan, begin, count, x, bf16, HS_FP32, 0); break;
    case HS_INT16: encode_half(plan, begin, count, x, bf16, HS_INT16, 0); break;
    case HS_INT8:
        if (plan->dithered)
            encode_half(plan, begin, count, x, bf16, HS_INT8, 1);
        else
            encode_half(plan, begin, count, x, bf16, HS_INT8, 0);
        break;
    default: encode_half(plan, begin, count, x, bf16, HS_BF16, 0); break;
    }
}

CLONES void hs_encode_master(const struct plan *plan, int64_t begin, int count, const float *x) {
    if (plan->parameter == HS_FP32)
        memcpy((float *)plan->job.parameter + begin, x, (size_t)count * sizeof *x);
    else if (plan->parameter == HS_BF16)
        encode_any(plan, begin, count, x, 1);
    else
        encode_any(plan, begin, count, x, 0);
}
