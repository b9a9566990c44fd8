/* What ADMM does between two products, in one pass over memory: see nnprune/alternation.py.

   With T = total + step E, and D the entries of T that are kept, an output's entries above its threshold or the n largest of
   every m inputs (of equal ones all):

       total = B0 + growth (T - D),    right = pull step E + D - total,

   right in bfloat16 and packed as the products of gram.c want it.

   Letters: I input features, O output features. */

#include "tile.h"

#ifdef BF16

typedef struct {
    float *total;
    const float *E, *B0, *thresholds;
    long outputs;
    int n, m;                           /* m = 0: by thresholds */
    float step, growth, pull;
} Step;

/* 16 outputs, or fewer, from one on, of `count` inputs from one on: writes the total and returns what goes to the right. */
static inline void advance(const Step *s, long input, int count, long output, __mmask16 lanes, __m512 *right)
{
    __m512 T[MOST_M], size[MOST_M], step = _mm512_set1_ps(s->step);
    for (int j = 0; j < count; j++) {
        long at = (input + j) * s->outputs + output;
        __m512 E = _mm512_mul_ps(step, _mm512_maskz_loadu_ps(lanes, s->E + at));
        T[j] = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, s->total + at), E);
        size[j] = _mm512_abs_ps(T[j]);
        right[j] = _mm512_mul_ps(E, _mm512_set1_ps(s->pull));
    }
    for (int j = 0; j < count; j++) {
        __mmask16 kept;
        if (s->m) {
            __m512i larger = _mm512_setzero_si512();
            for (int k = 0; k < s->m; k++)
                larger = _mm512_mask_add_epi32(
                    larger, _mm512_cmp_ps_mask(size[k], size[j], _CMP_GT_OQ), larger, _mm512_set1_epi32(1));
            kept = _mm512_cmplt_epi32_mask(larger, _mm512_set1_epi32(s->n));
        } else {
            kept = _mm512_cmp_ps_mask(size[j], _mm512_maskz_loadu_ps(lanes, s->thresholds + output), _CMP_GT_OQ);
        }
        long at = (input + j) * s->outputs + output;
        __m512 B0 = _mm512_maskz_loadu_ps(lanes, s->B0 + at), U = _mm512_maskz_mov_ps(~kept, T[j]);
        __m512 total = _mm512_fmadd_ps(_mm512_set1_ps(s->growth), U, B0);
        _mm512_mask_storeu_ps(s->total + at, lanes, total);
        right[j] = _mm512_sub_ps(_mm512_add_ps(right[j], _mm512_maskz_mov_ps(kept, T[j])), total);
    }
}

/* All arrays are (I, O), contiguous, but for thresholds (O,), which is not read where m > 0; then m divides I and is at most MOST_M.
   packed: as many lanes as gram_packed_size tells. */
void admm_step(
    float *total, const float *E, const float *B0, const float *thresholds, long inputs, long outputs, int n, int m, float step,
    float growth, float pull, uint32_t *packed, int num_threads)
{
    Step s = {total, E, B0, thresholds, outputs, n, m, step, growth, pull};
    long pairs = (inputs + 1) / 2;
    int at_once = m ? m : 2, whole = at_once % 2 ? 2 * at_once : at_once; /* inputs, whole pairs of them */
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (long input = 0; input < inputs; input += whole)
        for (long output = 0; output < panels_of(outputs) * PANEL; output += 16) {
            __m512 right[2 * MOST_M];
            __mmask16 lanes = first(outputs - output);
            int count = inputs - input < whole ? inputs - input : whole;
            for (int j = 0; j < count; j += at_once)
                advance(&s, input + j, count - j < at_once ? count - j : at_once, output, lanes, right + j);
            if (count % 2)
                right[count] = _mm512_setzero_ps();
            for (int j = 0; j < count; j += 2)
                store_pair(packed_at(packed, pairs, (input + j) / 2, output), right[j], right[j + 1]);
        }
}

#endif
