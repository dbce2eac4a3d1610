/* Dither for stochastic rounding: halfstep/optim/dither.py says what it is and why. */
#ifndef HALFSTEP_DITHER_H
#define HALFSTEP_DITHER_H

#include "formats.h"

#define GOLDEN 0x9E3779B9u
#define FIRST 0x9E3779B1u
#define SECOND 0x85EBCA6Bu

/* One parameter's stream at one step: what tells elements apart is added by `dither`. */
struct stream {
    uint32_t key;
    uint32_t offset; /* step * GOLDEN */
};

static inline struct stream stream_of(uint32_t seed, uint32_t ordinal, uint32_t first, uint32_t which, int64_t step) {
    uint32_t mixed = seed * GOLDEN + ordinal * FIRST + which * SECOND;
    mixed = (mixed ^ mixed >> 16) * 0x7FEB352Du;
    mixed = (mixed ^ mixed >> 15) * 0x846CA68Bu;
    return (struct stream){(mixed ^ mixed >> 16) + first * FIRST, (uint32_t)step * GOLDEN};
}

ALWAYS uint32_t dither(struct stream stream, uint32_t index) {
    const uint32_t x = index * FIRST + stream.key;
    return (x ^ x >> 16) * SECOND + stream.offset;
}

/* The top 24 bits as a number in [0, 1). */
ALWAYS float uniform(uint32_t bits) { return (float)(int32_t)(bits >> 8) * 0x1p-24f; }

#endif
