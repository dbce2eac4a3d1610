/* SGD and Lion for processors with AVX-512: thirty-two elements at a time, with the bits of the general path.
 *
 * They have so little to compute that one pass without scratch is what counts. What is rare (a NaN, the first step with
 * momentum, the end of a row) goes to the general path.
 */
#include "avx512.h"

#ifdef HS_AVX512

WIDE __m512 sgd_step(const struct plan *plan, __m512 x, __m512 g, __m512 *buffer, int has_buffer) {
    if (has_buffer) {
        const __m512 momentum = _mm512_set1_ps(plan->momentum);
        *buffer = _mm512_fmadd_ps(_mm512_set1_ps(plan->undamped), g, _mm512_mul_ps(*buffer, momentum));
        g = plan->nesterov ? _mm512_fmadd_ps(momentum, *buffer, g) : *buffer;
    }
    return _mm512_fmadd_ps(_mm512_set1_ps(plan->minus_size), g, x);
}

WIDE __m512 lion_step(const struct plan *plan, __m512 x, __m512 g, __m512 *average) {
    const __m512 missing = _mm512_sub_ps(g, *average), zero = _mm512_setzero_ps();
    const __m512 direction = _mm512_fmadd_ps(_mm512_set1_ps(plan->first.weight), missing, *average);
    const __mmask16 up = _mm512_cmp_ps_mask(direction, zero, _CMP_GT_OQ);
    const __mmask16 down = _mm512_cmp_ps_mask(direction, zero, _CMP_LT_OQ);
    const __m512 rising = _mm512_maskz_mov_ps(up, _mm512_set1_ps(1.0f));
    const __m512 sign = _mm512_mask_mov_ps(rising, down, _mm512_set1_ps(-1.0f)); /* of NaN 0, as in torch */
    *average = _mm512_fmadd_ps(_mm512_set1_ps(plan->second.weight), missing, *average);
    return _mm512_fmadd_ps(_mm512_set1_ps(plan->minus_size), sign, _mm512_mul_ps(x, _mm512_set1_ps(plan->shrink)));
}

/* Thirty-two elements; 0 where the general path must do them. */
WIDE int step_32(const struct plan *plan, int64_t i, enum hs_kind kind, enum hs_format parameter, enum hs_format kept,
                 int dithered, enum hs_format state) {
    ask_ahead(plan, i, parameter, kept, state, HS_ABSENT);
    struct pair g = load_gradient(plan, i, parameter);
    struct pair x = load_master(plan, i, parameter, kept);
    if (plan->decay != 0.0f) g = decayed(plan, g, x);
    struct pair m = state == HS_ABSENT ? g : load(plan->job.states[0], i, state);
    if (kind == HS_LION) {
        x.first = lion_step(plan, x.first, g.first, &m.first);
        x.second = lion_step(plan, x.second, g.second, &m.second);
    } else {
        x.first = sgd_step(plan, x.first, g.first, &m.first, state != HS_ABSENT);
        x.second = sgd_step(plan, x.second, g.second, &m.second, state != HS_ABSENT);
    }
    if (parameter == HS_BF16 && __builtin_expect(has_nan(x), 0)) return 0;
    if (state == HS_BF16 && __builtin_expect(has_nan(m), 0)) return 0;
    if (state == HS_FP32) store_fp32(plan->job.states[0], i, m);
    if (state == HS_BF16) _mm512_storeu_si512((uint16_t *)plan->job.states[0] + i, bf16_of(m));
    store_master(plan, i, x, parameter, kept, dithered);
    return 1;
}

WIDE void step(const struct plan *plan, int64_t begin, int64_t count, int64_t group, enum hs_kind kind,
               enum hs_format parameter, enum hs_format kept, int dithered, enum hs_format state) {
    const struct plan own = *plan; /* which nothing that is stored can change */
    const int64_t end = begin + count;
    for (; begin + 32 <= end; begin += 32)
        if (!step_32(&own, begin, kind, parameter, kept, dithered, state)) plan->rare(plan, begin, 32, group);
    if (begin < end) plan->rare(plan, begin, end - begin, group);
}

#define LOOP(name, kind, parameter, kept, dithered, state)                                      \
    WIDE_LOOP void name(const struct plan *plan, int64_t begin, int64_t count, int64_t group) { \
        step(plan, begin, count, group, kind, parameter, kept, dithered, state);                \
    }

#define LOOPS(name, parameter, kept, dithered)                                    \
    LOOP(name##_sgd, HS_SGD, parameter, kept, dithered, HS_ABSENT)                \
    LOOP(name##_sgd_fp32, HS_SGD, parameter, kept, dithered, HS_FP32)             \
    LOOP(name##_sgd_bf16, HS_SGD, parameter, kept, dithered, HS_BF16)             \
    LOOP(name##_lion_fp32, HS_LION, parameter, kept, dithered, HS_FP32)           \
    LOOP(name##_lion_bf16, HS_LION, parameter, kept, dithered, HS_BF16)           \
    static const hs_segment name[2][3] = {{name##_sgd, name##_sgd_fp32, name##_sgd_bf16}, \
                                          {0, name##_lion_fp32, name##_lion_bf16}};

WIDE_STORAGES(LOOPS)

#define CHOOSE(name, parameter, kept, dithered) \
    if (is_stored(plan, parameter, kept, dithered)) return name[lion][form];

hs_segment hs_wide_momentum(const struct plan *plan) {
    const enum hs_format state = plan->states[0];
    if (!has_avx512() || plan->gradient != plan->parameter) return 0;
    if (plan->kind != HS_LION && (plan->kind != HS_SGD || (state != HS_ABSENT && plan->first_step))) return 0;
    if (plan->kind == HS_LION && (plan->first.from_end || plan->second.from_end)) return 0;
    if (state != HS_ABSENT && state != HS_FP32 && state != HS_BF16) return 0;
    const int lion = plan->kind == HS_LION, form = state == HS_ABSENT ? 0 : state == HS_FP32 ? 1 : 2;
    WIDE_STORAGES(CHOOSE)
    return 0;
}

#else

hs_segment hs_wide_momentum(const struct plan *plan) {
    (void)plan;
    return 0;
}

#endif
