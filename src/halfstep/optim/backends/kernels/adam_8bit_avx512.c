/* AdamW with states of eight bits for processors with AVX-512.
 *
 * What a group of 64 is divided by is known only when all of it has been computed, and from the first load to the last
 * code that takes some two hundred cycles. A processor that goes group by group spends most of them waiting, so a block
 * of sixteen groups is done in two rounds. The first brings m and v forward; m, the root of v and the largest of each
 * stay in the first-level cache. The second steps the parameters and turns m and v into codes. Loops go through the
 * four vectors of a group stage by stage, so that four chains are under way at a time. The general path does what is
 * rare (a group that holds inf or NaN, the end of a row) before anything of it has been stored.
 *
 * Its bits are those of adam_8bit.c, its twin for every other processor.
 */
#include "adam_8bit.h"
#include "avx512.h"

#ifdef HS_AVX512

#define VECTORS 4 /* in a group */
#define GROUPS 16 /* in a block: as many as a vector has lanes, so that their scales are one vector */

/* What the first round leaves for the second. */
struct block {
    _Alignas(64) float m[GROUPS][GROUP], root[GROUPS][GROUP];
    __m512i largest_m[GROUPS], largest_root[GROUPS]; /* lane by lane, as bits */
    float m_factor[GROUPS], root_factor[GROUPS];     /* from codes, then to codes */
};

/* Thirty-two elements of a pair into two vectors of four. */
WIDE void put(__m512 *to, struct pair pair) {
    to[0] = pair.first;
    to[1] = pair.second;
}

/* Four vectors of small integers as 64 bytes in order; what a byte cannot hold becomes its largest. */
WIDE __m512i bytes_of(const __m512i *codes, int is_signed) {
    const __m512i first = _mm512_packs_epi32(codes[0], codes[1]), second = _mm512_packs_epi32(codes[2], codes[3]);
    const __m512i mixed = is_signed ? _mm512_packs_epi16(first, second) : _mm512_packus_epi16(first, second);
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), mixed);
}

WIDE __m512 magnitude(__m512 x) { return floats(_mm512_and_si512(integers(x), all(MAGNITUDE))); }

/* As integers, so that inf and NaN are the largest of all. */
WIDE __m512i largest_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    return _mm512_max_epi32(_mm512_max_epi32(integers(a), integers(b)), _mm512_max_epi32(integers(c), integers(d)));
}

/* The largest lane of each of sixteen vectors, in order: halves are interleaved and compared, four times. */
WIDE __m512 largest_of_each(const __m512i *rows) {
    __m512i by_two[8], by_four[4], by_eight[2];
    for (int k = 0; k < 8; k++)
        by_two[k] = _mm512_max_epi32(_mm512_unpacklo_epi32(rows[2 * k], rows[2 * k + 1]),
                                     _mm512_unpackhi_epi32(rows[2 * k], rows[2 * k + 1]));
    for (int k = 0; k < 4; k++)
        by_four[k] = _mm512_max_epi32(_mm512_unpacklo_epi64(by_two[2 * k], by_two[2 * k + 1]),
                                      _mm512_unpackhi_epi64(by_two[2 * k], by_two[2 * k + 1]));
    for (int k = 0; k < 2; k++)
        by_eight[k] = _mm512_max_epi32(_mm512_shuffle_i32x4(by_four[2 * k], by_four[2 * k + 1], 0x88),
                                       _mm512_shuffle_i32x4(by_four[2 * k], by_four[2 * k + 1], 0xDD));
    const __m512i largest = _mm512_max_epi32(_mm512_shuffle_i32x4(by_eight[0], by_eight[1], 0x88),
                                             _mm512_shuffle_i32x4(by_eight[0], by_eight[1], 0xDD));
    return floats(largest);
}

/* Zero, or a number whose codes the second round can compute. */
WIDE unsigned usual_scales(__m512 largest) {
    return (_mm512_cmp_ps_mask(largest, _mm512_set1_ps(SMALL), _CMP_GE_OQ) &
            _mm512_cmp_ps_mask(largest, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ)) |
           _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_EQ_OQ);
}

WIDE __m128i load_128(const void *from) { return _mm_loadu_si128((const __m128i *)from); }

/* The first round for one group. */
WIDE void step_states(struct block *block, int group, const struct plan *plan, const struct drawn_together *with,
                      int64_t i, enum hs_format parameter) {
    __m512 g[VECTORS], m[VECTORS], root[VECTORS];
    put(g, load(plan->job.gradient, i, parameter));
    put(g + 2, load(plan->job.gradient, i + 32, parameter));
    const int8_t *signed_codes = (const int8_t *)plan->job.states[0] + i;
    const uint8_t *square_codes = (const uint8_t *)plan->job.states[1] + i;
    const __m512 m_factor = _mm512_set1_ps(block->m_factor[group]);
    const __m512 root_factor = _mm512_set1_ps(block->root_factor[group]);
    for (int k = 0; k < VECTORS; k++) {
        const __m512 drawn = _mm512_mul_ps(g[k], _mm512_set1_ps(with->weight));
        const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_128(signed_codes + 16 * k)));
        const __m512 square = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_128(square_codes + 16 * k)));
        m[k] = _mm512_fmadd_ps(_mm512_mul_ps(code, magnitude(code)), m_factor, drawn);
        root[k] = _mm512_mul_ps(square, root_factor);
        root[k] = _mm512_sqrt_ps(_mm512_fmadd_ps(root[k], root[k], _mm512_mul_ps(drawn, drawn)));
        _mm512_store_ps(&block->m[group][16 * k], m[k]);
        _mm512_store_ps(&block->root[group][16 * k], root[k]);
    }
    block->largest_m[group] = largest_lanes(magnitude(m[0]), magnitude(m[1]), magnitude(m[2]), magnitude(m[3]));
    block->largest_root[group] = largest_lanes(root[0], root[1], root[2], root[3]);
}

/* What the next block needs, while this one computes. */
WIDE void ask_for_group(const struct plan *plan, int64_t i, enum hs_format parameter, enum hs_format kept) {
    const int size = parameter == HS_FP32 ? 4 : 2;
    ask_for(plan->job.gradient, i, GROUP, size);
    ask_for(plan->job.parameter, i, GROUP, size);
    if (kept != HS_ABSENT) ask_for(plan->job.kept, i, GROUP, size_of(kept));
    ask_for(plan->job.states[0], i, GROUP, 1);
    ask_for(plan->job.states[1], i, GROUP, 1);
}

/* The second round for one group; 0 where the general path must do it. */
WIDE int step_masters(const struct block *block, int group, const struct plan *plan, const struct drawn_together *with,
                      int64_t i, enum hs_format parameter, enum hs_format kept, int dithered) {
    const struct stream noise = plan->state_noise[1];
    const struct stream centred = {noise.key, noise.offset + 0x80000000u};
    const __m512i place = place_of(noise, i);
    const __m512 m_factor = _mm512_set1_ps(block->m_factor[group]);
    const __m512 root_factor = _mm512_set1_ps(block->root_factor[group]);
    __m512 x[VECTORS], m[VECTORS], root[VECTORS], step[VECTORS];
    __m512i signed_codes[VECTORS], square_codes[VECTORS];
    for (int k = 0; k < VECTORS; k++) {
        m[k] = _mm512_load_ps(&block->m[group][16 * k]);
        root[k] = _mm512_load_ps(&block->root[group][16 * k]);
        const __m512 denominator =
            _mm512_fmadd_ps(root[k], _mm512_set1_ps(with->denominator), _mm512_set1_ps(with->eps));
        step[k] = _mm512_div_ps(m[k], denominator);
    }
    ask_for_group(plan, i + GROUPS * GROUP, parameter, kept);
    put(x, load_master(plan, i, parameter, kept));
    put(x + 2, load_master(plan, i + 32, parameter, kept));
    for (int k = 0; k < VECTORS; k++) {
        /* To nearest after a number in [-1/2, 1/2), which is the floor after one in [0, 1). */
        const __m512 drawn = _mm512_cvtepi32_ps(wide_dither(centred, place, 16 * k));
        const __m512 exact = _mm512_mul_ps(root[k], root_factor);
        const __m512i square = _mm512_cvtps_epi32(_mm512_fmadd_ps(drawn, _mm512_set1_ps(0x1p-32f), exact));
        const __mmask16 present = _mm512_test_epi32_mask(integers(root[k]), integers(root[k]));
        square_codes[k] = _mm512_mask_max_epi32(square, present, square, all(1));
    }
    for (int k = 0; k < VECTORS; k++) {
        const __m512 code = _mm512_sqrt_ps(_mm512_mul_ps(magnitude(m[k]), m_factor));
        signed_codes[k] =
            _mm512_cvtps_epi32(floats(_mm512_ternarylogic_epi32(integers(code), integers(m[k]), all(SIGN), 0xF8)));
    }
    for (int k = 0; k < VECTORS; k++)
        x[k] = _mm512_add_ps(_mm512_mul_ps(x[k], _mm512_set1_ps(with->shrink)), step[k]);
    if (__builtin_expect(has_nan((struct pair){x[0], x[1]}) | has_nan((struct pair){x[2], x[3]}), 0)) return 0;
    store_master(plan, i, (struct pair){x[0], x[1]}, parameter, kept, dithered);
    store_master(plan, i + 32, (struct pair){x[2], x[3]}, parameter, kept, dithered);
    _mm512_storeu_si512((int8_t *)plan->job.states[0] + i, bytes_of(signed_codes, 1));
    _mm512_storeu_si512((uint8_t *)plan->job.states[1] + i, bytes_of(square_codes, 0));
    return 1;
}

WIDE void adam_block(const struct plan *plan, const struct drawn_together *with, int64_t begin, int groups,
                     int64_t first, enum hs_format parameter, enum hs_format kept, int dithered) {
    struct block block;
    float *scales_m = plan->job.scales[0] + first, *scales_root = plan->job.scales[1] + first;
    const __mmask16 here = (__mmask16)((1u << groups) - 1);
    const __m512 m_decode = _mm512_mul_ps(_mm512_maskz_loadu_ps(here, scales_m), _mm512_set1_ps(with->m_decode));
    const __m512 root_decode =
        _mm512_mul_ps(_mm512_maskz_loadu_ps(here, scales_root), _mm512_set1_ps(with->root_decode));
    _mm512_storeu_ps(block.m_factor, m_decode);
    _mm512_storeu_ps(block.root_factor, root_decode);
    for (int group = 0; group < groups; group++)
        step_states(&block, group, plan, with, begin + GROUP * group, parameter);
    for (int group = groups; group < GROUPS; group++)
        block.largest_m[group] = block.largest_root[group] = _mm512_setzero_si512();
    const __m512 largest_m = largest_of_each(block.largest_m), largest_root = largest_of_each(block.largest_root);
    const __m512 small = _mm512_set1_ps(SMALL);
    _mm512_storeu_ps(block.m_factor, _mm512_div_ps(_mm512_set1_ps(16129.0f), _mm512_max_ps(largest_m, small)));
    _mm512_storeu_ps(block.root_factor, _mm512_div_ps(_mm512_set1_ps(255.0f), _mm512_max_ps(largest_root, small)));
    unsigned usual = here & usual_scales(largest_m) & usual_scales(largest_root);
    for (int group = 0; group < groups; group++)
        if (!(usual >> group & 1) ||
            !step_masters(&block, group, plan, with, begin + GROUP * group, parameter, kept, dithered)) {
            usual &= ~(1u << group);
            plan->rare(plan, begin + GROUP * group, GROUP, first + group);
        }
    const __m512 tiny = _mm512_set1_ps(TINY);
    const __m512 true_root = _mm512_mul_ps(largest_root, _mm512_set1_ps(with->root_scale));
    _mm512_mask_storeu_ps(scales_m, (__mmask16)usual, _mm512_max_ps(largest_m, tiny));
    _mm512_mask_storeu_ps(scales_root, (__mmask16)usual, _mm512_max_ps(true_root, tiny));
}

WIDE void adam(const struct plan *plan, int64_t begin, int64_t count, int64_t group, enum hs_format parameter,
               enum hs_format kept, int dithered) {
    const struct drawn_together with = draw_together(plan);
    const int64_t end = begin + count;
    while (begin + GROUP <= end) {
        const int64_t left = (end - begin) / GROUP;
        const int groups = left < GROUPS ? (int)left : GROUPS;
        adam_block(plan, &with, begin, groups, group, parameter, kept, dithered);
        begin += GROUP * groups;
        group += groups;
    }
    if (begin < end) plan->rare(plan, begin, end - begin, group);
}

#define LOOP(name, parameter, kept, dithered)                                                          \
    WIDE_LOOP void name(const struct plan *plan, int64_t begin, int64_t count, int64_t group) {        \
        adam(plan, begin, count, group, parameter, kept, dithered);                                    \
    }

LOOP(fp32, HS_FP32, HS_ABSENT, 0)
LOOP(bf16_exact, HS_BF16, HS_INT16, 0)
LOOP(bf16_24bit, HS_BF16, HS_INT8, 0)
LOOP(bf16_24bit_dithered, HS_BF16, HS_INT8, 1)
LOOP(bf16_alone_dithered, HS_BF16, HS_ABSENT, 1)

hs_segment hs_wide_adam_8bit(const struct plan *plan) {
    if (!has_avx512() || !is_drawn_together(plan)) return 0;
    if (plan->parameter == HS_FP32) return fp32;
    if (plan->kept == HS_INT16) return bf16_exact;
    if (plan->kept == HS_INT8) return plan->dithered ? bf16_24bit_dithered : bf16_24bit;
    return bf16_alone_dithered;
}

#else

hs_segment hs_wide_adam_8bit(const struct plan *plan) {
    (void)plan;
    return 0;
}

#endif
