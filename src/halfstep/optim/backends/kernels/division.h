/* x / divisor, correctly rounded, for a divisor that many x share: in multiplications.
 *
 * 1 / divisor is kept in two floats, lower + rest, to some 47 bits. Their sum times x, rounded twice, is the correctly
 * rounded quotient but for the x whose quotient lies so near the middle between two floats that the error decides.
 * Those few x of a divisor are computed, and where one of them is rounded to the wrong side the residual is added:
 * Markstein's theorem makes that exact for every x. Both after Brisebarre, Muller and Raina, "Accelerating correctly
 * rounded floating-point division when the divisor is known in advance", IEEE Transactions on Computers 53 (2004).
 *
 * For divisors in [2^-40, 1] and square roots x of floats: 0, [2^-75, 2^64] and infinity, which stays one because
 * lower and rest are positive.
 */
#ifndef HALFSTEP_DIVISION_H
#define HALFSTEP_DIVISION_H

#include "formats.h"

struct divisor {
    float value, reciprocal, lower, rest;
};

ALWAYS struct divisor divisor_of(float value) {
    const double exact = 1.0 / (double)value;
    const float nearest = (float)exact;
    const float lower = (double)nearest >= exact ? float_of(bits_of(nearest) - 1) : nearest;
    return (struct divisor){value, nearest, lower, (float)(exact - (double)lower)};
}

ALWAYS int can_divide_by(float value) { return value >= 0x1p-40f && value <= 1.0f; }

ALWAYS float quotient_of(float x, struct divisor by) { return __builtin_fmaf(x, by.lower, x * by.rest); }

/* Whether `quotient_of` is exact for every x.
 *
 * With whole numbers X and D in [2^23, 2^24) for the fractions of x and of the divisor, the quotient X 2^s / D, where
 * s is 24 for X >= D and 25 for others, has its middles at odd numbers M in (2^24, 2^25): X 2^s = M D + r. What the
 * two floats and one product lose is below 2^-46 of the quotient, so that |r| <= 8 where it can matter. r = 0 is
 * impossible, D having too few factors 2; any other r leaves, modulo 2^s, few M.
 */
ALWAYS int divides_in_two(struct divisor by) {
    if (!(by.rest >= 0x1p-51f)) return 0; /* x * rest could be subnormal, and would then lose more */
    const uint64_t d = (bits_of(by.value) & 0x7FFFFFu) | 0x800000u;
    int twos = 0;
    while (twos < 4 && !(d >> twos & 1)) twos++;
    if (twos == 4) return 1; /* more factors than any r */
    const uint64_t odd = d >> twos;
    uint64_t inverse = odd; /* modulo 2^3, and with every turn to twice as many bits */
    for (int turn = 0; turn < 5; turn++) inverse *= 2 - odd * inverse;
    for (int s = 24; s <= 25; s++)
        for (int64_t r = -8; r <= 8; r++) {
            const int64_t unit = (int64_t)1 << twos;
            if (r % unit || !(r / unit & 1)) continue;
            const uint64_t modulus = (uint64_t)1 << (s - twos);
            uint64_t middle = (uint64_t)(-(r / unit)) * inverse & (modulus - 1);
            for (; middle < (uint64_t)1 << 25; middle += modulus) {
                if (middle < (uint64_t)1 << 24) continue;
                const uint64_t numerator = (uint64_t)((int64_t)(middle * d) + r) >> s;
                if (numerator < 0x800000u || numerator > 0xFFFFFFu || (numerator >= d) != (s == 24)) continue;
                const float x = (float)numerator;
                if (quotient_of(x, by) != x / by.value) return 0;
            }
        }
    return 1;
}

#endif
