/* One look at gradients: the sum of squares of all, and each one's largest magnitude.
 *
 * Squares are added in FP32 in sixty-four sums side by side, each of sixteen elements, and these in double: within 1e-6
 * of the sum in double, at the speed of reading. Where squares may leave FP32 (or an inf or NaN is there), which the
 * largest magnitude shows, a piece is added again in double. Magnitudes are compared as the integers that their bits
 * are: NaN is beyond them all.
 */
#include <stdatomic.h>
#include <stdlib.h>

#include "plan.h"

#define LANES 64
#define LENGTH 16
#define PIECE 65536
#define WORTH 131072

/* Between these a largest magnitude leaves sums of squares in FP32 neither too small nor too large. */
#define LEAST 0x1p-40f
#define MOST 0x1p58f

struct found {
    double sum;
    uint32_t largest; /* as bits */
};

ALWAYS float value(const void *data, int64_t i, enum hs_format format) {
    if (format == HS_FP32) return ((const float *)data)[i];
    const uint16_t half = ((const uint16_t *)data)[i];
    return format == HS_BF16 ? from_bf16(half) : from_fp16(half);
}

ALWAYS double sum_in_double(const void *data, int64_t begin, int64_t end, enum hs_format format) {
    double sum = 0.0;
    for (int64_t i = begin; i < end; i++) {
        const double x = (double)value(data, i, format);
        sum += x * x;
    }
    return sum;
}

ALWAYS struct found look(const void *data, int64_t begin, int64_t end, enum hs_format format) {
    double totals[LANES] = {0.0};
    uint32_t largest[LANES] = {0};
    uint16_t largest_half[LANES] = {0};
    int64_t i = begin;
    while (i + LANES <= end) {
        float sums[LANES] = {0.0f};
        for (int row = 0; row < LENGTH && i + LANES <= end; row++, i += LANES) {
            for (int lane = 0; lane < LANES; lane++) {
                const float x = value(data, i + lane, format);
                sums[lane] = __builtin_fmaf(x, x, sums[lane]);
            }
            for (int lane = 0; lane < LANES; lane++)
                if (format == HS_FP32) {
                    const uint32_t bits = bits_of(((const float *)data)[i + lane]) & MAGNITUDE;
                    largest[lane] = bits > largest[lane] ? bits : largest[lane];
                } else {
                    const uint16_t bits = ((const uint16_t *)data)[i + lane] & 0x7FFF;
                    largest_half[lane] = bits > largest_half[lane] ? bits : largest_half[lane];
                }
        }
        for (int lane = 0; lane < LANES; lane++) totals[lane] += (double)sums[lane];
    }
    struct found found = {sum_in_double(data, i, end, format), 0};
    for (; i < end; i++) {
        const uint32_t bits = bits_of(value(data, i, format)) & MAGNITUDE;
        found.largest = bits > found.largest ? bits : found.largest;
    }
    for (int lane = 0; lane < LANES; lane++) {
        const uint16_t half = largest_half[lane];
        const uint32_t wide = format == HS_FP32   ? largest[lane]
                              : format == HS_BF16 ? (uint32_t)half << 16
                                                  : bits_of(from_fp16(half));
        found.largest = wide > found.largest ? wide : found.largest;
        found.sum += totals[lane];
    }
    const float amax = float_of(found.largest);
    if (found.largest && !(amax >= LEAST && amax <= MOST)) found.sum = sum_in_double(data, begin, end, format);
    return found;
}

CLONES static struct found look_fp32(const void *data, int64_t begin, int64_t end) {
    return look(data, begin, end, HS_FP32);
}

CLONES static struct found look_bf16(const void *data, int64_t begin, int64_t end) {
    return look(data, begin, end, HS_BF16);
}

CLONES static struct found look_fp16(const void *data, int64_t begin, int64_t end) {
    return look(data, begin, end, HS_FP16);
}

struct shared {
    const struct hs_gradient *gradients;
    const int64_t *first_piece; /* of each gradient, and of all */
    struct found *found;        /* by each piece: added in their order, whoever found them */
    int64_t count;
    atomic_llong next;
};

static void look_at_pieces(void *context) {
    struct shared *shared = context;
    int64_t which = 0;
    for (;;) {
        const int64_t piece = atomic_fetch_add_explicit(&shared->next, 1, memory_order_relaxed);
        if (piece >= shared->first_piece[shared->count]) return;
        while (shared->first_piece[which + 1] <= piece) which++;
        const struct hs_gradient *gradient = &shared->gradients[which];
        const int64_t begin = (piece - shared->first_piece[which]) * PIECE;
        const int64_t end = gradient->numel - begin < PIECE ? gradient->numel : begin + PIECE;
        shared->found[piece] = gradient->format == HS_FP32   ? look_fp32(gradient->data, begin, end)
                               : gradient->format == HS_BF16 ? look_bf16(gradient->data, begin, end)
                                                             : look_fp16(gradient->data, begin, end);
    }
}

int32_t hs_survey(const struct hs_gradient *gradients, int64_t count, double *sum_of_squares, float *amax,
                  int32_t threads) {
    int64_t *first_piece = malloc((size_t)(count + 1) * sizeof *first_piece);
    if (!first_piece) return HS_NO_MEMORY;
    int64_t elements = 0;
    first_piece[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        if (gradients[i].format < HS_FP32 || gradients[i].format > HS_FP16) {
            free(first_piece);
            return HS_UNKNOWN_FORMAT;
        }
        first_piece[i + 1] = first_piece[i] + (gradients[i].numel + PIECE - 1) / PIECE;
        elements += gradients[i].numel;
    }
    struct found *found = malloc((size_t)(first_piece[count] + 1) * sizeof *found);
    if (!found) {
        free(first_piece);
        return HS_NO_MEMORY;
    }
    struct shared shared = {gradients, first_piece, found, count, 0};
    const int64_t worth = elements / WORTH + 1;
    hs_run(threads < worth ? threads : (int)worth, look_at_pieces, &shared);
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t largest = 0;
        for (int64_t piece = first_piece[i]; piece < first_piece[i + 1]; piece++) {
            sum += found[piece].sum;
            largest = found[piece].largest > largest ? found[piece].largest : largest;
        }
        amax[i] = float_of(largest);
    }
    *sum_of_squares = sum;
    free(found);
    free(first_piece);
    return HS_DONE;
}
