/* AdamW with states of eight bits, as adam_8bit_avx512.c and adam_8bit.c both compute it, bit for bit.
 *
 * What they leave to the general path they leave alike too, group by group: one that holds inf or NaN, or whose largest
 * number is too small, and the end of a row.
 */
#ifndef HALFSTEP_ADAM_8BIT_H
#define HALFSTEP_ADAM_8BIT_H

#include "plan.h"

#define TINY 0x1p-126f
/* Below this a factor from states to codes would overflow. */
#define SMALL 0x1p-110f

/* The scalars of a step, drawn together so that an element takes few operations.
 *
 *     g' = g w,  w = coefficient (1 - beta1)           m = beta1 m + g'
 *     v' = v k^2,  k = (1 - beta1) / sqrt(1 - beta2)   v' = beta2 v' + g'^2
 *     x = x shrink + m / (sqrt(v') denominator + eps'),  both divided by the step's size
 *
 * The codes' factors take beta1, and k sqrt(beta2), along. This rounds less often than rules.py and in other places:
 * the result is a few units in the last place of FP32 away, some 2^-14 of a code's spacing, in three quarters of the
 * time.
 */
struct drawn_together {
    float weight;      /* w */
    float m_decode;    /* beta1 / 127^2 */
    float root_decode; /* k sqrt(beta2) / 255 */
    float root_scale;  /* 1 / k */
    float denominator; /* 1 / (k sqrt(1 - beta2^step)), divided by the step's size, as is eps */
    float eps, shrink;
};

ALWAYS struct drawn_together draw_together(const struct plan *plan) {
    const double weight = (double)plan->first.weight, root = (double)plan->root;
    const double k = weight / __builtin_sqrt((double)plan->one_minus_beta2);
    return (struct drawn_together){
        .weight = (float)(weight * (double)plan->coefficient),
        .m_decode = (float)((1.0 - weight) / 16129.0),
        .root_decode = (float)(k * __builtin_sqrt((double)plan->beta2) / 255.0),
        .root_scale = (float)(1.0 / k),
        .denominator = (float)(1.0 / (k * root * (double)plan->minus_size)),
        .eps = (float)((double)plan->eps / (double)plan->minus_size),
        .shrink = plan->shrink,
    };
}

/* Whether a plan is of the storages and hyperparameters that are computed so. */
ALWAYS int is_drawn_together(const struct plan *plan) {
    const float size = __builtin_fabsf(plan->minus_size);
    if (!(plan->root >= 0x1p-20f && plan->first.weight >= 0x1p-20f)) return 0;
    if (!(size >= 0x1p-60f && size <= 0x1p60f)) return 0; /* lr 0 among them */
    if (plan->kind != HS_ADAM || plan->amsgrad || plan->decay != 0.0f || plan->first.from_end) return 0;
    if (plan->states[0] != HS_INT8 || plan->states[1] != HS_UINT8 || plan->gradient != plan->parameter) return 0;
    if (plan->parameter == HS_FP32) return 1;
    if (plan->parameter != HS_BF16) return 0;
    return plan->kept == HS_INT16 || plan->kept == HS_INT8 || (plan->kept == HS_ABSENT && plan->dithered);
}

#endif
