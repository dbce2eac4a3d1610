/* AdamW for processors with AVX-512: the loops of adam.c, thirty-two elements at a time, with the same bits.
 *
 * Why by hand: one thread has some thirty cycles for sixteen elements before it is slower than memory. A square root
 * takes ten of them and a division six, and compilers neither know that the division by sqrt(1 - beta2^t) can be done
 * with multiplications, nor handle halves well. What is rare (a NaN that must become the canonical one, the end of a
 * row) goes to the loops of adam.c instead; nothing has been stored by then.
 */
#include "avx512.h"

#ifdef HS_AVX512

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
    const __mmask16 infinite = _mm512_fpclass_ps_mask(lost, 0x99); /* or NaN */
    const __m512i counts = _mm512_cvtps_epi32(_mm512_mul_ps(lost, wide_unit(halves, 1)));
    const __m512i kept = _mm512_mask_mov_epi32(counts, infinite, _mm512_setzero_si512());
    _mm256_storeu_si256((__m256i *)parameter, halves);
    _mm256_storeu_si256((__m256i *)remainder, _mm512_cvtepi32_epi16(kept));
}

WIDE __m512i nearest_bf16(__m512 x) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(integers(x), 16), all(1));
    return _mm512_add_epi32(_mm512_add_epi32(integers(x), all(0x7FFF)), odd);
}

WIDE __m512i dithered_bf16(__m512 x, struct stream noise, __m512i place, uint32_t after) {
    return _mm512_add_epi32(integers(x), _mm512_srli_epi32(wide_dither(noise, place, after), 16));
}

/* Thirty-two elements; 0 where adam.c must do them. */
WIDE int adam_32(const struct plan *plan, const struct scalars *with, int64_t i, enum hs_format parameter,
                 enum hs_format state) {
    float *whole = (float *)plan->job.parameter + (parameter == HS_FP32 ? i : 0);
    uint16_t *half = (uint16_t *)plan->job.parameter + (parameter == HS_FP32 ? 0 : i);
    int16_t *remainder = (int16_t *)plan->job.kept + (parameter == HS_FP32 ? 0 : i);
    const float *gradient = (const float *)plan->job.gradient + (parameter == HS_FP32 ? i : 0);
    const uint16_t *half_gradient = (const uint16_t *)plan->job.gradient + (parameter == HS_FP32 ? 0 : i);
    float *exp_avg = (float *)plan->job.states[0] + (state == HS_FP32 ? i : 0);
    float *exp_avg_sq = (float *)plan->job.states[1] + (state == HS_FP32 ? i : 0);
    uint16_t *half_avg = (uint16_t *)plan->job.states[0] + (state == HS_FP32 ? 0 : i);
    uint16_t *half_avg_sq = (uint16_t *)plan->job.states[1] + (state == HS_FP32 ? 0 : i);

    struct pair g, x;
    if (parameter == HS_FP32) {
        g = load_fp32(gradient);
        x = load_fp32(whole);
    } else if (parameter == HS_BF16) {
        g = load_bf16(half_gradient);
        x = join_remainder(_mm512_loadu_si512(half), _mm512_loadu_si512(remainder), 0);
    } else {
        g = load_fp16(half_gradient);
        x = (struct pair){join_fp16(half, remainder), join_fp16(half + 16, remainder + 16)};
    }
    struct pair m = state == HS_FP32 ? load_fp32(exp_avg) : load_bf16(half_avg);
    struct pair v = state == HS_FP32 ? load_fp32(exp_avg_sq) : load_bf16(half_avg_sq);
    wide_moments(with, g.first, &m.first, &v.first);
    wide_moments(with, g.second, &m.second, &v.second);
    const __m512 shrink = _mm512_set1_ps(with->shrink);
    x.first = _mm512_add_ps(_mm512_mul_ps(x.first, shrink), wide_step(with, m.first, _mm512_sqrt_ps(v.first)));
    x.second = _mm512_add_ps(_mm512_mul_ps(x.second, shrink), wide_step(with, m.second, _mm512_sqrt_ps(v.second)));
    /* A NaN in m or v has by now made one of x. An infinite v has not, and must not be dithered. */
    if (parameter == HS_BF16 || state == HS_BF16)
        if (__builtin_expect(has_nan(x), 0)) return 0;
    if (state == HS_FP32) {
        store_fp32(exp_avg, m);
        store_fp32(exp_avg_sq, v);
    } else {
        const __m512i infinity = all(INFINITE);
        const __m512i largest = _mm512_max_epi32(integers(v.first), integers(v.second));
        if (__builtin_expect(_mm512_cmpge_epi32_mask(largest, infinity) != 0, 0)) return 0;
        const struct stream noise = plan->state_noise[1];
        const struct pair near = {floats(nearest_bf16(m.first)), floats(nearest_bf16(m.second))};
        const __m512i place = place_of(noise, i);
        const struct pair moved = {floats(dithered_bf16(v.first, noise, place, 0)),
                                   floats(dithered_bf16(v.second, noise, place, 16))};
        _mm512_storeu_si512(half_avg, uppers(near));
        _mm512_storeu_si512(half_avg_sq, uppers(moved));
    }
    if (parameter == HS_FP32) {
        store_fp32(whole, x);
    } else if (parameter == HS_BF16) {
        const __m512i lower = lowers(x);
        _mm512_storeu_si512(half, _mm512_sub_epi16(uppers(x), _mm512_srai_epi16(lower, 15)));
        _mm512_storeu_si512(remainder, lower);
    } else {
        split_fp16(x.first, half, remainder);
        split_fp16(x.second, half + 16, remainder + 16);
    }
    return 1;
}

WIDE void adam(const struct plan *plan, int64_t begin, int64_t count, int64_t group, enum hs_format parameter,
               enum hs_format state) {
    const struct scalars with = scalars_of(plan);
    const int64_t end = begin + count;
    for (; begin + 32 <= end; begin += 32)
        if (!adam_32(plan, &with, begin, parameter, state)) plan->rare(plan, begin, 32, group);
    if (begin < end) plan->rare(plan, begin, end - begin, group);
}

#define LOOP(name, parameter, state)                                                                   \
    WIDE_LOOP void name(const struct plan *plan, int64_t begin, int64_t count, int64_t group) {        \
        adam(plan, begin, count, group, parameter, state);                                             \
    }

LOOP(fp32_fp32, HS_FP32, HS_FP32)
LOOP(fp32_bf16, HS_FP32, HS_BF16)
LOOP(bf16_fp32, HS_BF16, HS_FP32)
LOOP(bf16_bf16, HS_BF16, HS_BF16)
LOOP(fp16_fp32, HS_FP16, HS_FP32)
LOOP(fp16_bf16, HS_FP16, HS_BF16)

hs_segment hs_wide_adam(const struct plan *plan) {
    if (!has_avx512() || !can_divide_by(plan->root)) return 0;
    const int wide = plan->states[0] == HS_FP32;
    if (plan->parameter == HS_FP32) return wide ? fp32_fp32 : fp32_bf16;
    if (plan->parameter == HS_BF16) return wide ? bf16_fp32 : bf16_bf16;
    return wide ? fp16_fp32 : fp16_bf16;
}

#else

hs_segment hs_wide_adam(const struct plan *plan) {
    (void)plan;
    return 0;
}

#endif
