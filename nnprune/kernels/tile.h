/* Register tiles of a product of bfloat16 matrices with sums in float32.

   VDPBF16PS multiplies pairs: two neighbouring terms of every sum share 32 bits. */

#pragma once

#include "native.h"

#ifdef BF16

#define PANEL 48                /* features that are packed together, three vectors: see gram.c */

/* Packed factors are [panel][pair of terms][feature of the panel]; what is beyond the last feature or term is zero. */
static inline long panels_of(long features) { return (features + PANEL - 1) / PANEL; }

#define TILE static inline __attribute__((always_inline)) void

/* In all of these `sum` is (rows, 16 x parts); `rows` and `parts` are constants, small enough for it to stay in registers. */

TILE clear_tile(__m512 (*sum)[4], const int rows, const int parts)
{
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            sum[row][part] = _mm512_setzero_ps();
}

/* Rows in memory are `stride` apart. */
TILE add_to_tile(__m512 (*sum)[4], const float *from, long stride, const int rows, const int parts)
{
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            sum[row][part] = _mm512_add_ps(sum[row][part], _mm512_loadu_ps(from + row * stride + 16 * part));
}

TILE store_tile(__m512 (*sum)[4], float *to, long stride, const int rows, const int parts)
{
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            _mm512_storeu_ps(to + row * stride + 16 * part, sum[row][part]);
}

/* sum += A B over `pairs` pairs of terms. Pair p of row r of A stands at A[r * row_step + p * pair_step], pair p
   of all columns of B at B + p * width. */
TILE add_tile(
    const uint32_t *A, long row_step, long pair_step, const uint32_t *B, long width, long pairs, __m512 (*sum)[4], const int rows,
    const int parts)
{
    for (long pair = 0; pair < pairs; pair++, A += pair_step, B += width) {
        __m512bh b[4];
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            b[part] = (__m512bh)_mm512_loadu_si512(B + 16 * part);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            __m512bh a = (__m512bh)_mm512_set1_epi32(A[row * row_step]);
#pragma GCC unroll 4
            for (int part = 0; part < parts; part++)
                sum[row][part] = _mm512_dpbf16_ps(sum[row][part], a, b[part]);
        }
    }
}

#endif
