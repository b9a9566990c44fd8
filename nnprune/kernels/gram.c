/* X^T Y of bfloat16 activations with sums in float32: a Hessian, or what two streams of the same tokens have in common.

   PyTorch has no such product on a CPU: it rounds the result to bfloat16, or multiplies float32 at half the rate.

   Two tokens of a feature share a lane, as VDPBF16PS wants its factors. Features are packed in panels, all tokens of a panel
   one after the other, so that a tile of the result reads two runs of memory. A product of two bfloat16 numbers is exact in
   float32; subnormal ones count as zero.

   Letters: T tokens, I features of X, J features of Y. */

#include "tile.h"

#ifdef BF16

#define ROWS 8                  /* of a register tile, ROWS x PANEL: 24 accumulators of 32 registers */
#define PAIRS 64                /* of tokens at a time: two panels of them fit into the nearest cache */

/* Number of 32-bit lanes that `gram_pack` writes. */
long gram_packed_size(long tokens, long features) { return panels_of(features) * ((tokens + 1) / 2) * PANEL; }

/* Packs X (T, I), whose tokens are `stride` apart, as [panel][pair of tokens][feature]; what is beyond X is zero. */
void gram_pack(const uint16_t *X, long tokens, long features, long stride, uint32_t *packed, int num_threads)
{
    long pairs = (tokens + 1) / 2;
#pragma omp parallel for num_threads(num_threads) collapse(2) schedule(static)
    for (long panel = 0; panel < panels_of(features); panel++)
        for (long start = 0; start < pairs; start += PAIRS) {
            long stop = start + PAIRS < pairs ? start + PAIRS : pairs;
            for (long pair = start; pair < stop; pair++)
                for (long lane = 0; lane < PANEL; lane += 16) {
                    long feature = panel * PANEL + lane;
                    __mmask16 mask = first(features - feature);
                    const uint16_t *even = X + 2 * pair * stride + feature;
                    __mmask16 odd_mask = 2 * pair + 1 < tokens ? mask : 0;
                    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
                    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd_mask, even + stride));
                    _mm512_storeu_si512(
                        packed + (panel * pairs + pair) * PANEL + lane, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
                }
        }
}

/* total (ROWS, PANEL) += A^T B over `pairs` pairs of tokens of two panels, A being ROWS features of the first. They are summed by
   themselves first: short sums lose fewer digits. */
static inline void add_rows(const uint32_t *A, const uint32_t *B, long pairs, float *total)
{
    __m512 sum[ROWS][4];
    clear_tile(sum, ROWS, 3);
    add_tile(A, 1, PANEL, B, PANEL, pairs, sum, ROWS, 3);
    add_to_tile(sum, total, PANEL, ROWS, 3);
    store_tile(sum, total, PANEL, ROWS, 3);
}

/* total (I, J) = `keep` times itself + X^T Y for packed X and Y, keep being 0 or 1. With `lower`, only panels that touch the lower
   triangle. */
void gram_add(
    const uint32_t *X, const uint32_t *Y, long tokens, long rows, long columns, int lower, int keep, float *total, int num_threads)
{
    long pairs = (tokens + 1) / 2;
#pragma omp parallel for num_threads(num_threads) collapse(2) schedule(dynamic)
    for (long i = 0; i < panels_of(rows); i++)
        for (long j = 0; j < panels_of(columns); j++) {
            if (lower && j > i)
                continue;
            float tile[PANEL * PANEL] __attribute__((aligned(64))) = {0};
            const uint32_t *A = X + i * pairs * PANEL, *B = Y + j * pairs * PANEL;
            for (long pair = 0; pair < pairs; pair += PAIRS)
                for (int row = 0; row < PANEL; row += ROWS)
                    add_rows(A + pair * PANEL + row, B + pair * PANEL, pairs - pair < PAIRS ? pairs - pair : PAIRS, tile + row * PANEL);
            for (long row = 0; row < PANEL && i * PANEL + row < rows; row++) {
                float *into = total + (i * PANEL + row) * columns + j * PANEL;
                for (long column = 0; column < PANEL && j * PANEL + column < columns; column++)
                    into[column] = tile[row * PANEL + column] + (keep ? into[column] : 0);
            }
        }
}

#endif
