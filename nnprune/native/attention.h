/* What the kernels of causal attention share. */

#pragma once

#include <math.h>
#include <string.h>

#include "native.h"

#ifdef BF16

#define KEYS 64                 /* of a block: four vectors */

typedef struct {
    const uint16_t *data;
    long batch, head, token;    /* strides; features lie side by side */
} Input;

/* e^x for x <= 0, to the last digit or two. NaN stays NaN. */
static inline __m512 exponential(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-87.f), x); /* of two, the second where one is NaN */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(p, n);
}

/* Tokens, rounded up to whole blocks. */
static inline long padded(long tokens) { return (tokens + KEYS - 1) / KEYS * KEYS; }

/* Keys of a head as [block of keys][pair of features][key], zero beyond the last. */
static void pack_keys(const uint16_t *keys, long stride, long tokens, long width, uint32_t *packed)
{
    for (long start = 0; start < tokens; start += KEYS, packed += width / 2 * KEYS)
        for (long key = 0; key < KEYS; key++)
            for (long pair = 0; pair < width / 2; pair++)
                packed[pair * KEYS + key] = start + key < tokens ? ((const uint32_t *)(keys + (start + key) * stride))[pair] : 0;
}

#endif
