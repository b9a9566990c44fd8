/* Vectors that any processor's compiler makes the best of. */

#pragma once

#include <string.h>

#include "native.h"

#define LANES 16
typedef float floats __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

static inline floats blend(ints mask, floats yes, floats no) { return (floats)((mask & (ints)yes) | (~mask & (ints)no)); }

/* LANES numbers in bfloat16. */
static inline floats load(const uint16_t *from)
{
    halves bits;
    memcpy(&bits, from, sizeof bits);
    return (floats)(__builtin_convertvector(bits, ints) << 16);
}

/* To the nearest bfloat16, of two the even one. */
static inline halves round_to_bfloat16(floats x)
{
#ifdef BF16
    return (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    ints bits = (ints)x, up = bits + 0x7fff + (bits >> 16 & 1);
    return __builtin_convertvector((ints)blend(x == x, (floats)up, x) >> 16, halves);
#endif
}

static inline floats rounded(floats x) { return (floats)(__builtin_convertvector(round_to_bfloat16(x), ints) << 16); }

static inline void store(uint16_t *to, floats x)
{
    halves bits = round_to_bfloat16(x);
    memcpy(to, &bits, sizeof bits);
}

/* 2^x to 2e-7 of it, for x <= 126, at least 2^-126: a polynomial through the Chebyshev nodes of what rounding x leaves. NaN stays NaN. */
static inline floats power_of_two(floats x)
{
    x = blend(x < -126, (floats){0} - 126, x);
    floats n = (x + 0x1.8p23f) - 0x1.8p23f, r = x - n;
    floats p = 1.33908633e-3f * r + 9.67603177e-3f;
    p = p * r + .0555035695f;
    p = p * r + .240221068f;
    p = p * r + .693147182f;
    p = p * r + 1;
    return p * (floats)((__builtin_convertvector(n, ints) + 127) << 23);
}
