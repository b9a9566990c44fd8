/* What conjugate gradients do between two products, output by output: see nnprune/leastsquares.py.

   A direction exists in bfloat16 alone, packed as the products of gram.c want it, so that weights and residuals move along just what was
   multiplied.

   Letters: I input features, O output features. */

#include <math.h>

#include "tile.h"

#ifdef BF16

#define VECTORS (PANEL / 16)

typedef struct {
    __m512 even, odd;
} Pair;

static inline Pair unpacked(const uint32_t *from)
{
    __m512i both = _mm512_loadu_si512(from);
    return (Pair){
        _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
        _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)))};
}

static inline void store_packed(uint32_t *to, Pair pair)
{
    __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(pair.even));
    __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(pair.odd));
    _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
}

/* 0 where it is none: nothing left to do, or nothing but rounding. */
static inline __m512 ratio(__m512 above, __m512 below)
{
    __m512 found = _mm512_div_ps(above, below);
    __mmask16 is_one = _mm512_cmp_ps_mask(found, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_maskz_mov_ps(is_one & _mm512_cmp_ps_mask(found, _mm512_set1_ps(INFINITY), _CMP_LT_OQ), found);
}

/* All (I, O) arrays are contiguous. B: the weights, whose nonzeros are the support. residual: on return 0 elsewhere. support: a bit each,
   [16 outputs][input]. norm (O,): the squared norms of the residual. direction: the residual, as many lanes as gram_packed_size
   tells. */
void conjugate_start(
    const float *B, float *residual, long inputs, long outputs, uint16_t *support, float *norm, uint32_t *direction, int num_threads)
{
    long pairs = (inputs + 1) / 2, panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (long vector = 0; vector < panels * VECTORS; vector++) {
        __mmask16 lanes = first(outputs - 16 * vector);
        __m512 sum = _mm512_setzero_ps();
        for (long input = 0; input < inputs; input += 2) {
            __m512 here[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int j = 0; j < 2 && input + j < inputs; j++) {
                long at = (input + j) * outputs + 16 * vector;
                __m512 weight = _mm512_maskz_loadu_ps(lanes, B + at);
                __mmask16 kept = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ);
                support[vector * inputs + input + j] = kept;
                here[j] = _mm512_maskz_loadu_ps(kept & lanes, residual + at);
                _mm512_mask_storeu_ps(residual + at, lanes, here[j]);
                sum = _mm512_fmadd_ps(here[j], here[j], sum);
            }
            uint32_t *to = direction + (vector / VECTORS * pairs + input / 2) * PANEL + vector % VECTORS * 16;
            store_packed(to, (Pair){here[0], here[1]});
        }
        _mm512_mask_storeu_ps(norm + 16 * vector, lanes, sum);
    }
}

/* One step of all outputs: changes all but product (I, O), which is A times the direction, and support. */
void conjugate_step(
    float *B, float *residual, const float *product, long inputs, long outputs, const uint16_t *support, float *norm,
    uint32_t *direction, int num_threads)
{
    long pairs = (inputs + 1) / 2, panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (long vector = 0; vector < panels * VECTORS; vector++) {
        __mmask16 lanes = first(outputs - 16 * vector);
        uint32_t *along = direction + vector / VECTORS * pairs * PANEL + vector % VECTORS * 16;
        __m512 curvature[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (long input = 0; input < inputs; input += 2) {
            long at = input * outputs + 16 * vector;
            Pair d = unpacked(along + input / 2 * PANEL);
            curvature[0] = _mm512_fmadd_ps(d.even, _mm512_maskz_loadu_ps(lanes, product + at), curvature[0]);
            if (input + 1 < inputs)
                curvature[1] = _mm512_fmadd_ps(d.odd, _mm512_maskz_loadu_ps(lanes, product + at + outputs), curvature[1]);
        }
        __m512 last = _mm512_maskz_loadu_ps(lanes, norm + 16 * vector);
        __m512 step = ratio(last, _mm512_add_ps(curvature[0], curvature[1])), sum = _mm512_setzero_ps();
        for (long input = 0; input < inputs; input++) {
            long at = input * outputs + 16 * vector;
            Pair d = unpacked(along + input / 2 * PANEL);
            __m512 weight = _mm512_fmadd_ps(step, input % 2 ? d.odd : d.even, _mm512_maskz_loadu_ps(lanes, B + at));
            _mm512_mask_storeu_ps(B + at, lanes, weight);
            __mmask16 kept = support[vector * inputs + input] & lanes;
            __m512 moved = _mm512_maskz_loadu_ps(kept, product + at);
            __m512 left = _mm512_fnmadd_ps(step, moved, _mm512_maskz_loadu_ps(lanes, residual + at));
            _mm512_mask_storeu_ps(residual + at, lanes, left);
            sum = _mm512_fmadd_ps(left, left, sum);
        }
        _mm512_mask_storeu_ps(norm + 16 * vector, lanes, sum);
        __m512 share = ratio(sum, last);
        for (long input = 0; input < inputs; input += 2) {
            long at = input * outputs + 16 * vector;
            Pair d = unpacked(along + input / 2 * PANEL);
            d.even = _mm512_fmadd_ps(share, d.even, _mm512_maskz_loadu_ps(lanes, residual + at));
            d.odd = _mm512_setzero_ps();
            if (input + 1 < inputs)
                d.odd = _mm512_fmadd_ps(share, unpacked(along + input / 2 * PANEL).odd, _mm512_maskz_loadu_ps(lanes, residual + at + outputs));
            store_packed(along + input / 2 * PANEL, d);
        }
    }
}

#endif
