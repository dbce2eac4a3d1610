/* AdamW for processors with AVX-512: thirty-two elements at a time, with the bits of adam.c and the general path.
 *
 * Why by hand: one thread has some thirty cycles for sixteen elements before it is slower than memory. A square root
 * takes ten of them and a division six, and compilers neither know that the division by sqrt(1 - beta2^t) can be done
 * with two multiplications (division.h), nor handle halves well. What is rare (a NaN that must become the canonical
 * one, the end of a row) goes to the other loops instead; nothing has been stored by then.
 */
#include "avx512.h"

#ifdef HS_AVX512

WIDE __m512i dithered_bf16(__m512 x, struct stream noise, __m512i place, uint32_t after) {
    return _mm512_add_epi32(integers(x), _mm512_srli_epi32(wide_dither(noise, place, after), 16));
}

WIDE void store_dithered_bf16(const struct plan *plan, int which, int64_t i, struct pair x) {
    const struct stream noise = plan->state_noise[which];
    const __m512i place = place_of(noise, i);
    const struct pair moved = {floats(dithered_bf16(x.first, noise, place, 0)),
                               floats(dithered_bf16(x.second, noise, place, 16))};
    _mm512_storeu_si512((uint16_t *)plan->job.states[which] + i, uppers(moved));
}

/* Thirty-two elements; 0 where the other loops must do them. */
WIDE int adam_32(const struct plan *plan, const struct scalars *with, int64_t i, enum hs_format parameter,
                 enum hs_format kept, int dithered, enum hs_format state, int in_two) {
    ask_ahead(plan, i, parameter, kept, state, state);
    struct pair g = load_gradient(plan, i, parameter);
    struct pair x = load_master(plan, i, parameter, kept);
    if (plan->decay != 0.0f) g = decayed(plan, g, x);
    struct pair m = load(plan->job.states[0], i, state), v = load(plan->job.states[1], i, state);
    wide_moments(with, g.first, &m.first, &v.first);
    wide_moments(with, g.second, &m.second, &v.second);
    const __m512 shrink = _mm512_set1_ps(with->shrink);
    struct pair w = v; /* what is divided by the root of */
    if (plan->amsgrad) {
        const struct pair largest = load(plan->job.states[2], i, state);
        if (__builtin_expect(has_nan(largest), 0)) return 0; /* of a NaN and a number max is the second */
        w = (struct pair){_mm512_max_ps(largest.first, v.first), _mm512_max_ps(largest.second, v.second)};
    }
    const __m512 first = wide_step(with, m.first, _mm512_sqrt_ps(w.first), in_two);
    const __m512 second = wide_step(with, m.second, _mm512_sqrt_ps(w.second), in_two);
    x.first = _mm512_add_ps(_mm512_mul_ps(x.first, shrink), first);
    x.second = _mm512_add_ps(_mm512_mul_ps(x.second, shrink), second);

    /* A NaN in m or v has by now made one of x. Infinities may be rounded like numbers: nothing below 2^16 changes
     * their upper half. */
    if ((parameter == HS_BF16 || state == HS_BF16) && __builtin_expect(has_nan(x), 0)) return 0;
    if (state == HS_FP32) {
        store_fp32(plan->job.states[0], i, m);
        store_fp32(plan->job.states[1], i, v);
        if (plan->amsgrad) store_fp32(plan->job.states[2], i, w);
    } else {
        _mm512_storeu_si512((uint16_t *)plan->job.states[0] + i, bf16_of(m));
        store_dithered_bf16(plan, 1, i, v);
        if (plan->amsgrad) store_dithered_bf16(plan, 2, i, w);
    }
    store_master(plan, i, x, parameter, kept, dithered);
    return 1;
}

WIDE void adam(const struct plan *plan, int64_t begin, int64_t count, int64_t group, enum hs_format parameter,
               enum hs_format kept, int dithered, enum hs_format state, int in_two) {
    const struct scalars with = scalars_of(plan);
    const struct plan own = *plan; /* which nothing that is stored can change */
    const int64_t end = begin + count;
    for (; begin + 32 <= end; begin += 32)
        if (!adam_32(&own, &with, begin, parameter, kept, dithered, state, in_two)) plan->rare(plan, begin, 32, group);
    if (begin < end) plan->rare(plan, begin, end - begin, group);
}

#define LOOP(name, parameter, kept, dithered, state, in_two)                                    \
    WIDE_LOOP void name(const struct plan *plan, int64_t begin, int64_t count, int64_t group) { \
        adam(plan, begin, count, group, parameter, kept, dithered, state, in_two);              \
    }

/* By whether the state is FP32, and whether division takes two operations. */
#define LOOPS(name, parameter, kept, dithered)                          \
    LOOP(name##_fp32, parameter, kept, dithered, HS_FP32, 0)            \
    LOOP(name##_bf16, parameter, kept, dithered, HS_BF16, 0)            \
    LOOP(name##_fp32_in_two, parameter, kept, dithered, HS_FP32, 1)     \
    LOOP(name##_bf16_in_two, parameter, kept, dithered, HS_BF16, 1)     \
    static const hs_segment name[2][2] = {{name##_bf16, name##_bf16_in_two}, {name##_fp32, name##_fp32_in_two}};

WIDE_STORAGES(LOOPS)

#define CHOOSE(name, parameter, kept, dithered) \
    if (is_stored(plan, parameter, kept, dithered)) return name[wide][in_two];

hs_segment hs_wide_adam(const struct plan *plan) {
    const enum hs_format state = plan->states[0];
    if (!has_avx512() || !can_divide_by(plan->root)) return 0;
    if (plan->kind != HS_ADAM || plan->first.from_end) return 0;
    if (plan->gradient != plan->parameter || plan->states[1] != state) return 0;
    if (plan->amsgrad && plan->states[2] != state) return 0;
    if (state != HS_FP32 && state != HS_BF16) return 0;
    const int wide = state == HS_FP32, in_two = divides_in_two(divisor_of(plan->root));
    WIDE_STORAGES(CHOOSE)
    return 0;
}

#else

hs_segment hs_wide_adam(const struct plan *plan) {
    (void)plan;
    return 0;
}

#endif
