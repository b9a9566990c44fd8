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

/* 2^x for x <= 0, to 4e-6 of it: far less than what is lost when it becomes bfloat16. A polynomial through the Chebyshev nodes of
   what rounding x leaves. NaN stays NaN. */
static inline __m512 power_of_two(__m512 x)
{
    __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(.00966636837f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(.0559219755f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(.240223497f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(.693121016f));
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

/* Two tokens of a feature side by side, as [pair of tokens][feature], zero beyond the last token; `width` is a multiple of 16. */
static void pack_pairs(const uint16_t *from, long step, long tokens, long width, uint32_t *to)
{
    for (long token = 0; token < padded(tokens); token += 2, from += 2 * step)
        for (long e = 0; e < width; e += 16, to += 16) {
            __mmask16 even = token < tokens ? 0xffff : 0, odd = token + 1 < tokens ? 0xffff : 0;
            __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, from + e));
            __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, from + step + e));
            _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

#endif
