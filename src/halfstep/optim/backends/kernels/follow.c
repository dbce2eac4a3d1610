/* Masters that follow what was written into their 16-bit parameters from outside.
 *
 * Nearly always nothing was: so a block is only read, and compared without a branch; where something in it differs,
 * its masters are set one by one.
 */
#include <stdatomic.h>

#include "plan.h"

#define PIECE 65536
#define WORTH 131072
#define COMPARED 1024

ALWAYS uint16_t rounded(float master, enum hs_format format) {
    return format == HS_BF16 ? to_bf16(master) : to_fp16(master);
}

/* Not 0 where the parameter is another number than the master rounded; zeros of both signs are one number. */
ALWAYS uint32_t difference(uint16_t parameter, float master, enum hs_format format) {
    const uint32_t half = rounded(master, format);
    return ((half | parameter) & 0x7FFFu) ? half ^ parameter : 0u;
}

ALWAYS void follow(const struct hs_pair *pair, int64_t begin, int64_t end, enum hs_format format) {
    const uint16_t *restrict parameter = pair->parameter;
    float *restrict master = pair->master;
    for (; begin < end; begin += COMPARED) {
        const int64_t stop = end - begin < COMPARED ? end : begin + COMPARED;
        uint32_t differs = 0;
        for (int64_t i = begin; i < stop; i++) differs |= difference(parameter[i], master[i], format);
        if (!differs) continue;
        for (int64_t i = begin; i < stop; i++)
            if (difference(parameter[i], master[i], format))
                master[i] = format == HS_BF16 ? from_bf16(parameter[i]) : from_fp16(parameter[i]);
    }
}

CLONES static void follow_bf16(const struct hs_pair *pair, int64_t begin, int64_t end) {
    follow(pair, begin, end, HS_BF16);
}

CLONES static void follow_fp16(const struct hs_pair *pair, int64_t begin, int64_t end) {
    follow(pair, begin, end, HS_FP16);
}

struct shared {
    const struct hs_pair *pairs;
    int64_t count;
    atomic_llong next; /* the first piece that nobody has taken */
};

static int64_t pieces_of(const struct hs_pair *pair) { return (pair->numel + PIECE - 1) / PIECE; }

static void follow_pieces(void *context) {
    struct shared *shared = context;
    int64_t which = 0, before = 0; /* pieces of the pairs before this one */
    for (;;) {
        const int64_t piece = atomic_fetch_add_explicit(&shared->next, 1, memory_order_relaxed);
        while (which < shared->count && before + pieces_of(&shared->pairs[which]) <= piece)
            before += pieces_of(&shared->pairs[which++]);
        if (which == shared->count) return;
        const struct hs_pair *pair = &shared->pairs[which];
        const int64_t begin = (piece - before) * PIECE;
        const int64_t end = pair->numel - begin < PIECE ? pair->numel : begin + PIECE;
        if (pair->format == HS_BF16)
            follow_bf16(pair, begin, end);
        else
            follow_fp16(pair, begin, end);
    }
}

int32_t hs_follow(const struct hs_pair *pairs, int64_t count, int32_t threads) {
    int64_t elements = 0;
    for (int64_t i = 0; i < count; i++) {
        if (pairs[i].format != HS_BF16 && pairs[i].format != HS_FP16) return HS_UNKNOWN_FORMAT;
        elements += pairs[i].numel;
    }
    struct shared shared = {pairs, count, 0};
    const int64_t worth = elements / WORTH + 1;
    hs_run(threads < worth ? threads : (int)worth, follow_pieces, &shared);
    return HS_DONE;
}
