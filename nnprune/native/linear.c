/* Y = X W^T + bias in bfloat16 with sums in float32, rounded once: a linear's forward.

   Outputs are packed in panels like the factors of gram.c, anew for each call, which takes a hundredth of the time of 2048 tokens. X is read
   where it is: two neighbouring inputs of a token share 32 bits already. Sums are made in the order of PyTorch's own product
   (oneDNN 3.x), so that the results are the same, bit by bit.

   Letters: T tokens, I input features, O output features. */

#include "tile.h"

#ifdef BF16

#define ROWS 8                  /* tokens of a register tile, ROWS x PANEL: 24 accumulators of 32 registers */
#define GROUP 64                /* tokens that are a thread's task, few enough for a cache */
#define SHORT 256               /* pairs of inputs that are summed by themselves: no more than twice as many are there, */
#define LONG 512                /* or more */

/* Columns of 16 x 16 lanes as rows. */
static inline void transpose(__m512i *rows)
{
    __m512i twos[16], fours[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) { /* of rows i, i + 1, i + 2, i + 3 */
        int from = i / 4 * 4 + i % 4 / 2;
        fours[i] = _mm512_unpacklo_epi64(twos[from], twos[from + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(twos[from], twos[from + 2]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) { /* columns j, 4 + j, 8 + j and 12 + j */
        __m512i even = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88), odd = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
        rows[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
        rows[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        rows[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
}

/* W (O, I) as [panel of outputs][pair of inputs][output of the panel], zero beyond the last output. */
static void pack_outputs(const uint32_t *W, long outputs, long pairs, long panel, uint32_t *packed)
{
    for (long pair = 0; pair < pairs; pair += 16)
        for (long output = panel * PANEL; output < (panel + 1) * PANEL; output += 16) {
            __m512i rows[16];
#pragma GCC unroll 16
            for (int row = 0; row < 16; row++)
                rows[row] = _mm512_maskz_loadu_epi32(
                    output + row < outputs ? first(pairs - pair) : 0, W + (output + row) * pairs + pair);
            transpose(rows);
            for (int row = 0; row < 16 && pair + row < pairs; row++)
                _mm512_storeu_si512(packed_at(packed, pairs, pair + row, output), rows[row]);
        }
}

/* Y (rows, up to PANEL outputs) of rows of X and a panel of outputs. */
TILE multiply(
    const uint32_t *X, const uint32_t *panel, const uint16_t *bias, long pairs, long outputs, uint16_t *Y, long stride,
    const int rows)
{
    long most = pairs <= 2 * SHORT ? SHORT : LONG, start = 0;
    float total[ROWS * PANEL] __attribute__((aligned(64)));
    __m512 sum[ROWS][4];
    for (; start + most < pairs; start += most) {
        clear_tile(sum, rows, 3);
        add_tile(X + start, pairs, 1, panel + start * PANEL, PANEL, most, sum, rows, 3);
        if (start)
            add_to_tile(sum, total, PANEL, rows, 3);
        store_tile(sum, total, PANEL, rows, 3);
    }
    clear_tile(sum, rows, 3);
    add_tile(X + start, pairs, 1, panel + start * PANEL, PANEL, pairs - start, sum, rows, 3);
    if (start)
        add_to_tile(sum, total, PANEL, rows, 3);
#pragma GCC unroll 3
    for (int part = 0; part < 3; part++) {
        __mmask16 mask = first(outputs - 16 * part);
        __m512i shift = _mm512_setzero_si512();
        if (bias)
            shift = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias + 16 * part)), 16);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            if (bias)
                sum[row][part] = _mm512_add_ps(sum[row][part], (__m512)shift);
            _mm256_mask_storeu_epi16(Y + row * stride + 16 * part, mask, (__m256i)_mm512_cvtneps_pbh(sum[row][part]));
        }
    }
}

/* Y (T, O) for X (T, I), W (O, I) and bias (O,) or NULL, all contiguous, X and W at multiples of four bytes; I is even. room: of
   gram_packed_size(I, O) lanes. */
void linear(
    const uint16_t *X, const uint16_t *W, const uint16_t *bias, long tokens, long inputs, long outputs, uint16_t *Y, uint32_t *room,
    int num_threads)
{
    long pairs = inputs / 2;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static)
        for (long panel = 0; panel < panels_of(outputs); panel++)
            pack_outputs((const uint32_t *)W, outputs, pairs, panel, room);
#pragma omp for schedule(dynamic)
        for (long group = 0; group < tokens; group += GROUP) {
            long stop = group + GROUP < tokens ? group + GROUP : tokens;
            for (long panel = 0; panel < panels_of(outputs); panel++) {
                const uint32_t *own = room + panel * pairs * PANEL;
                const uint16_t *shift = bias ? bias + panel * PANEL : NULL;
                long left = outputs - panel * PANEL, token = group;
                for (; token + ROWS <= stop; token += ROWS)
                    multiply(
                        (const uint32_t *)X + token * pairs, own, shift, pairs, left, Y + token * outputs + panel * PANEL, outputs, ROWS);
                for (; token < stop; token++)
                    multiply((const uint32_t *)X + token * pairs, own, shift, pairs, left, Y + token * outputs + panel * PANEL, outputs, 1);
            }
        }
    }
}

#endif
