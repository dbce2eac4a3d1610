/* bf16, fp16 and the bits of float, without branches, so that loops over them become vectors.
 *
 * Conversions round to nearest even like torch's; a NaN stays a NaN. fp16 goes through integers and one addition of
 * a power of two instead of the processor's own conversion: that works on every machine, in every vector width, and
 * also where subnormals are flushed to zero.
 */
#ifndef HALFSTEP_FORMATS_H
#define HALFSTEP_FORMATS_H

#include <stdint.h>
#include <string.h>

#define ALWAYS static inline __attribute__((always_inline))

#define SIGN 0x80000000u
#define MAGNITUDE 0x7FFFFFFFu
#define INFINITE 0x7F800000u
#define QUIET_NAN 0x7FC00000u

ALWAYS uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

ALWAYS float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

ALWAYS int is_nan(uint32_t bits) { return (bits & MAGNITUDE) > INFINITE; }

ALWAYS int is_finite(uint32_t bits) { return (bits & MAGNITUDE) < INFINITE; }

/* NaN made the canonical one of its sign: others would not look like NaN in the upper half. */
ALWAYS uint32_t canonical(uint32_t bits) { return is_nan(bits) ? (bits & SIGN) | QUIET_NAN : bits; }

ALWAYS float from_bf16(uint16_t half) { return float_of((uint32_t)half << 16); }

ALWAYS uint16_t to_bf16(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(is_nan(bits) ? QUIET_NAN >> 16 : rounded);
}

ALWAYS float from_fp16(uint16_t half) {
    const uint32_t sign = ((uint32_t)half & 0x8000u) << 16;
    const uint32_t shifted = ((uint32_t)half & 0x7FFFu) << 13; /* field and mantissa in a float's places */
    const uint32_t field = shifted & 0x0F800000u;
    const uint32_t normal = shifted + ((127u - 15u) << 23);
    const uint32_t special = shifted + ((255u - 31u) << 23);
    /* A subnormal is its mantissa on top of 2^-14, less 2^-14. */
    const uint32_t small = bits_of(float_of(shifted + (113u << 23)) - float_of(113u << 23));
    const uint32_t magnitude = field == 0u ? small : field == 0x0F800000u ? special : normal;
    return float_of(magnitude | sign);
}

ALWAYS uint16_t to_fp16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t magnitude = bits & MAGNITUDE;
    /* To nearest even at bit 13, then the exponent's new offset; from 65520 on this has become infinity's pattern. */
    const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - ((127u - 15u) << 23)) >> 13;
    /* Below 2^-14 the spacing is 2^-24, that of a float in [0.5, 1): the addition rounds. */
    const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    uint32_t half = magnitude < (113u << 23) ? small : normal;
    half = magnitude >= 0x477FF000u ? 0x7C00u : half; /* 65520 */
    half = magnitude > INFINITE ? 0x7E00u : half;
    return (uint16_t)(half | (bits >> 16 & 0x8000u));
}

#endif
