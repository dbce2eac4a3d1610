/* Any combination of formats and rule: block by block through FP32 scratch that stays in the first-level cache. */
#include "plan.h"

void hs_segment_general(const struct plan *plan, int64_t begin, int64_t count, int64_t group) {
    float x[BLOCK], g[BLOCK], scratch[HS_STATES][BLOCK];
    float *const states[HS_STATES] = {
        plan->states[0] ? scratch[0] : 0,
        plan->states[1] ? scratch[1] : 0,
        plan->states[2] ? scratch[2] : 0,
    };
    for (int64_t end = begin + count; begin < end; begin += BLOCK, group += BLOCK / GROUP) {
        const int length = end - begin < BLOCK ? (int)(end - begin) : BLOCK;
        hs_decode_gradient(plan, begin, length, g);
        hs_decode_master(plan, begin, length, x);
        for (int i = 0; i < HS_STATES && states[i]; i++) hs_decode_state(plan, i, begin, length, group, states[i]);
        hs_apply(plan, length, x, g, states);
        for (int i = 0; i < HS_STATES && states[i]; i++) hs_encode_state(plan, i, begin, length, group, states[i]);
        hs_encode_master(plan, begin, length, x);
    }
}
