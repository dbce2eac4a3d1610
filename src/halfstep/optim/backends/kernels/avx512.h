/* Vectors of sixteen FP32 numbers for processors with AVX-512: what the loops of adam_avx512.c,
 * adam_8bit_avx512.c and momentum_avx512.c share.
 *
 * Sixteen-bit halves are handled thirty-two at a time. An FP32 number is two of them, and one instruction interleaves
 * or separates two vectors of halves, so that most of decoding and encoding happens on twice as many elements at once.
 */
#ifndef HALFSTEP_AVX512_H
#define HALFSTEP_AVX512_H

#include "division.h"
#include "plan.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(HS_PORTABLE)
#define HS_AVX512 1

#include <immintrin.h>

#define WIDE_TARGET target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#define WIDE static inline __attribute__((always_inline, WIDE_TARGET))
#define WIDE_LOOP static __attribute__((WIDE_TARGET))

ALWAYS int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

/* Ask memory for what will be needed. Processors do so by themselves, but begin anew at each page of each array, and a
 * step has too few operations to hide that: asking saves a tenth of its time. Beyond an array's end it does nothing. */
WIDE void ask_for(const void *array, int64_t element, int count, int size) {
    const char *at = (const char *)array + element * size;
    for (int line = 0; line < count * size; line += 64) _mm_prefetch(at + line, _MM_HINT_T0);
}

/* Thirty-two FP32 numbers in their order. */
struct pair {
    __m512 first, second;
};

WIDE __m512i integers(__m512 x) { return _mm512_castps_si512(x); }

WIDE __m512 floats(__m512i bits) { return _mm512_castsi512_ps(bits); }

WIDE __m512i all(uint32_t value) { return _mm512_set1_epi32((int)value); }

WIDE __m512i all_halves(uint32_t value) { return _mm512_set1_epi16((short)value); }

/* Sixteen 32-bit numbers, each `start + lane * step` twice: positions of halves. */
WIDE __m512i counting(uint32_t start, uint32_t step) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(_mm512_mullo_epi32(lane, all(step)), all(start));
}

/* Thirty-two FP32 numbers from their upper and lower halves: (lower[0], upper[0], lower[1], upper[1], ...). */
WIDE struct pair join(__m512i upper, __m512i lower) {
    const __m512i first = counting(0x00200000, 0x00010001), second = counting(0x00300010, 0x00010001);
    return (struct pair){floats(_mm512_permutex2var_epi16(lower, first, upper)),
                         floats(_mm512_permutex2var_epi16(lower, second, upper))};
}

WIDE __m512i uppers(struct pair x) {
    return _mm512_permutex2var_epi16(integers(x.first), counting(0x00030001, 0x00040004), integers(x.second));
}

WIDE __m512i lowers(struct pair x) {
    return _mm512_permutex2var_epi16(integers(x.first), counting(0x00020000, 0x00040004), integers(x.second));
}

ALWAYS int size_of(enum hs_format format) {
    return format == HS_FP32 ? 4 : format == HS_INT8 || format == HS_UINT8 ? 1 : 2;
}

WIDE struct pair load(const void *array, int64_t i, enum hs_format format) {
    const char *from = (const char *)array + i * size_of(format);
    if (format == HS_FP32) return (struct pair){_mm512_loadu_ps(from), _mm512_loadu_ps(from + 64)};
    if (format == HS_BF16) return join(_mm512_loadu_si512(from), _mm512_setzero_si512());
    return (struct pair){_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)),
                         _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + 32)))};
}

WIDE void store_fp32(void *array, int64_t i, struct pair x) {
    _mm512_storeu_ps((float *)array + i, x.first);
    _mm512_storeu_ps((float *)array + i + 16, x.second);
}

/* Whether a NaN is among them: a comparison with two operands looks at both. */
WIDE int has_nan(struct pair x) { return _mm512_cmp_ps_mask(x.first, x.second, _CMP_UNORD_Q) != 0; }

/* division.h for sixteen x: without the residual where `in_two`. */
WIDE __m512 divide(__m512 x, struct divisor by, int in_two) {
    const __m512 rest = _mm512_mul_ps(x, _mm512_set1_ps(by.rest));
    const __m512 quotient = _mm512_fmadd_ps(x, _mm512_set1_ps(by.lower), rest);
    if (in_two) return quotient;
    const __m512 missing = _mm512_fnmadd_ps(quotient, _mm512_set1_ps(by.value), x);
    const __mmask16 finite = _mm512_cmp_ps_mask(quotient, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    return _mm512_mask3_fmadd_ps(missing, _mm512_set1_ps(by.reciprocal), quotient, finite);
}

/* Where an element stands in a stream, before it is mixed: the same in all lanes, `wide_dither` counts them up. */
WIDE __m512i place_of(struct stream stream, int64_t begin) { return all((uint32_t)begin * FIRST + stream.key); }

/* The dither of the sixteen elements that come `after` so many from a place on. */
WIDE __m512i wide_dither(struct stream stream, __m512i place, uint32_t after) {
    const __m512i each = _mm512_add_epi32(place, counting(after * FIRST, FIRST));
    const __m512i mixed = _mm512_xor_si512(each, _mm512_srli_epi32(each, 16));
    return _mm512_add_epi32(_mm512_mullo_epi32(mixed, all(SECOND)), all(stream.offset));
}

/* What to_bf16 has in its upper half before the shift; not for NaN. */
WIDE __m512i nearest_bf16(__m512 x) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(integers(x), 16), all(1));
    return _mm512_add_epi32(_mm512_add_epi32(integers(x), all(0x7FFF)), odd);
}

WIDE __m512i bf16_of(struct pair x) {
    return uppers((struct pair){floats(nearest_bf16(x.first)), floats(nearest_bf16(x.second))});
}

/* bf16 halves and signed remainders, whose highest bit is what the rounding of the half added, to the FP32 number.
 * A negative remainder of a half that is zero (see masters.py) gives NaN, and so is left to the other loops. */
WIDE struct pair join_remainder(__m512i halves, __m512i remainders, int places) {
    const __m512i upper = _mm512_add_epi16(halves, _mm512_srai_epi16(remainders, 15));
    return join(upper, places ? _mm512_slli_epi16(remainders, (unsigned)places) : remainders);
}

/* The separate master where its rounding is the parameter (a zero of either sign is zero), else the parameter. */
WIDE struct pair agreed(__m512i halves, struct pair master) {
    const __m512i rounded = bf16_of(master);
    const __mmask32 zeros = _mm512_testn_epi16_mask(_mm512_or_si512(halves, rounded), all_halves(0x7FFF));
    const __mmask32 same = _mm512_cmpeq_epi16_mask(halves, rounded) | zeros;
    const struct pair near = join(halves, _mm512_setzero_si512());
    return (struct pair){_mm512_mask_mov_ps(near.first, (__mmask16)same, master.first),
                         _mm512_mask_mov_ps(near.second, (__mmask16)(same >> 16), master.second)};
}

/* 2^(field - 39) of fp16 halves as a float, or its reciprocal. */
WIDE __m512 wide_unit(__m256i halves, int reciprocal) {
    const __m512i masked = _mm512_cvtepu16_epi32(_mm256_and_si256(halves, _mm256_set1_epi16(0x7C00)));
    const __m512i field = _mm512_slli_epi32(masked, 13);
    return floats(reciprocal ? _mm512_sub_epi32(all((127 + 39) << 23), field)
                             : _mm512_add_epi32(field, all((127 - 39) << 23)));
}

WIDE __m512 join_fp16(const uint16_t *parameter, const int16_t *remainder) {
    const __m256i halves = _mm256_loadu_si256((const __m256i *)parameter);
    const __m512i counts = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)remainder));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(counts), wide_unit(halves, 0), _mm512_cvtph_ps(halves));
}

WIDE void split_fp16(__m512 x, uint16_t *parameter, int16_t *remainder) {
    const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    const __m512 lost = _mm512_sub_ps(x, _mm512_cvtph_ps(halves));
    /* Of inf and NaN this is -2^31, of which the lower half is 0: what is due. */
    const __m512i counts = _mm512_cvtps_epi32(_mm512_mul_ps(lost, wide_unit(halves, 1)));
    _mm256_storeu_si256((__m256i *)parameter, halves);
    _mm256_storeu_si256((__m256i *)remainder, _mm512_cvtepi32_epi16(counts));
}

/* masters.py's decode and encode for thirty-two parameters; x of bf16 ones holds no NaN. */
WIDE struct pair load_master(const struct plan *plan, int64_t i, enum hs_format parameter, enum hs_format kept) {
    if (parameter == HS_FP32) return load(plan->job.parameter, i, HS_FP32);
    if (parameter == HS_FP16) {
        const uint16_t *half = (const uint16_t *)plan->job.parameter + i;
        const int16_t *remainder = (const int16_t *)plan->job.kept + i;
        return (struct pair){join_fp16(half, remainder), join_fp16(half + 16, remainder + 16)};
    }
    const __m512i halves = _mm512_loadu_si512((const uint16_t *)plan->job.parameter + i);
    const char *beside = (const char *)plan->job.kept + i * size_of(kept);
    if (kept == HS_INT8)
        return join_remainder(halves, _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)beside)), 8);
    if (kept == HS_INT16) return join_remainder(halves, _mm512_loadu_si512(beside), 0);
    if (kept == HS_FP32) return agreed(halves, load(plan->job.kept, i, HS_FP32));
    return join(halves, _mm512_setzero_si512());
}

WIDE void store_master(const struct plan *plan, int64_t i, struct pair x, enum hs_format parameter,
                       enum hs_format kept, int dithered) {
    if (parameter == HS_FP32) {
        store_fp32(plan->job.parameter, i, x);
        return;
    }
    uint16_t *half = (uint16_t *)plan->job.parameter + i;
    char *beside = (char *)plan->job.kept + i * size_of(kept);
    if (parameter == HS_FP16) {
        split_fp16(x.first, half, (int16_t *)beside);
        split_fp16(x.second, half + 16, (int16_t *)beside + 16);
        return;
    }
    if (kept == HS_FP32) {
        _mm512_storeu_si512(half, bf16_of(x));
        store_fp32(plan->job.kept, i, x);
        return;
    }
    if (dithered) {
        const __m512i place = place_of(plan->weight_noise, i);
        const int places = kept == HS_INT8 ? 24 : 16;
        const __m512i first = _mm512_srli_epi32(wide_dither(plan->weight_noise, place, 0), places);
        const __m512i second = _mm512_srli_epi32(wide_dither(plan->weight_noise, place, 16), places);
        x.first = floats(_mm512_add_epi32(integers(x.first), first));
        x.second = floats(_mm512_add_epi32(integers(x.second), second));
    }
    const __m512i upper = uppers(x);
    if (kept == HS_ABSENT) {
        _mm512_storeu_si512(half, upper);
        return;
    }
    __m512i lower = lowers(x);
    if (kept == HS_INT8 && !dithered) {
        /* To the nearest 2^8, and from there the upper half to the nearest 2^16. */
        const __mmask32 carry = _mm512_cmpge_epu16_mask(lower, all_halves(0x7F80));
        _mm512_storeu_si512(half, _mm512_mask_add_epi16(upper, carry, upper, all_halves(1)));
        lower = _mm512_add_epi16(lower, all_halves(0x80));
    } else {
        _mm512_storeu_si512(half, _mm512_sub_epi16(upper, _mm512_srai_epi16(lower, 15)));
    }
    if (kept == HS_INT16)
        _mm512_storeu_si512(beside, lower);
    else
        _mm256_storeu_si256((__m256i *)beside, _mm512_cvtepi16_epi8(_mm512_srli_epi16(lower, 8)));
}

/* The storages of weights that the loops of adam_avx512.c and momentum_avx512.c are made for: a name, and how they are
 * told. */
#define WIDE_STORAGES(each)                            \
    each(fp32, HS_FP32, HS_ABSENT, 0)                  \
    each(fp16_exact, HS_FP16, HS_INT16, 0)             \
    each(bf16_exact, HS_BF16, HS_INT16, 0)             \
    each(bf16_24bit, HS_BF16, HS_INT8, 0)              \
    each(bf16_24bit_dithered, HS_BF16, HS_INT8, 1)     \
    each(bf16_separate, HS_BF16, HS_FP32, 0)           \
    each(bf16_alone_dithered, HS_BF16, HS_ABSENT, 1)

ALWAYS int is_stored(const struct plan *plan, enum hs_format parameter, enum hs_format kept, int dithered) {
    return plan->parameter == parameter && plan->kept == kept && plan->dithered == dithered;
}

/* Elements between what is worked on and what memory is asked for: measured; half and double are as good. */
#define AHEAD 96

WIDE void ask_ahead(const struct plan *plan, int64_t i, enum hs_format parameter, enum hs_format kept,
                    enum hs_format first, enum hs_format second) {
    const int64_t later = i + AHEAD;
    ask_for(plan->job.gradient, later, 32, size_of(parameter));
    ask_for(plan->job.parameter, later, 32, size_of(parameter));
    if (kept != HS_ABSENT) ask_for(plan->job.kept, later, 32, size_of(kept));
    if (first != HS_ABSENT) ask_for(plan->job.states[0], later, 32, size_of(first));
    if (second != HS_ABSENT) ask_for(plan->job.states[1], later, 32, size_of(second));
}

WIDE struct pair load_gradient(const struct plan *plan, int64_t i, enum hs_format format) {
    const struct pair g = load(plan->job.gradient, i, format);
    const __m512 coefficient = _mm512_set1_ps(plan->coefficient);
    return (struct pair){_mm512_mul_ps(g.first, coefficient), _mm512_mul_ps(g.second, coefficient)};
}

/* Weight decay that goes through the gradient. */
WIDE struct pair decayed(const struct plan *plan, struct pair g, struct pair x) {
    const __m512 decay = _mm512_set1_ps(plan->decay);
    return (struct pair){_mm512_fmadd_ps(decay, x.first, g.first), _mm512_fmadd_ps(decay, x.second, g.second)};
}

/* The scalars of a step of Adam. */
struct scalars {
    float shrink, weight, eps, beta2, one_minus_beta2, minus_size;
    struct divisor root;
};

ALWAYS struct scalars scalars_of(const struct plan *plan) {
    return (struct scalars){.shrink = plan->shrink,
                            .weight = plan->first.weight,
                            .eps = plan->eps,
                            .beta2 = plan->beta2,
                            .one_minus_beta2 = plan->one_minus_beta2,
                            .minus_size = plan->minus_size,
                            .root = divisor_of(plan->root)};
}

/* rules.py's Adam on sixteen elements, in two parts: m and v, and what is added to x. */
WIDE void wide_moments(const struct scalars *with, __m512 g, __m512 *m, __m512 *v) {
    *m = _mm512_fmadd_ps(_mm512_set1_ps(with->weight), _mm512_sub_ps(g, *m), *m);
    const __m512 square = _mm512_mul_ps(_mm512_set1_ps(with->one_minus_beta2), g);
    *v = _mm512_fmadd_ps(square, g, _mm512_mul_ps(_mm512_set1_ps(with->beta2), *v));
}

WIDE __m512 wide_step(const struct scalars *with, __m512 m, __m512 root, int in_two) {
    const __m512 denominator = _mm512_add_ps(divide(root, with->root, in_two), _mm512_set1_ps(with->eps));
    return _mm512_div_ps(_mm512_mul_ps(_mm512_set1_ps(with->minus_size), m), denominator);
}

#endif
#endif
