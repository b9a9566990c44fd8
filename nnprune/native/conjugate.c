/* What conjugate gradients do between two products, output by output: see nnprune/leastsquares.py.

   A direction exists in bfloat16 alone, packed as the products of gram.c want it, so that weights and residuals move along just what was
   multiplied.

   Letters: I input features, O output features. */

#include <math.h>

#include "tile.h"

#ifdef BF16

static inline __m512 even_of(__m512i pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); }

static inline __m512 odd_of(__m512i pair) { return _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(0xffff0000))); }

/* above / below, and 0 where that is not positive and finite: nothing left to do, or nothing but rounding. */
static inline __m512 ratio(__m512 above, __m512 below)
{
    __m512 found = _mm512_div_ps(above, below);
    __mmask16 positive = _mm512_cmp_ps_mask(found, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_maskz_mov_ps(positive & _mm512_cmp_ps_mask(found, _mm512_set1_ps(INFINITY), _CMP_LT_OQ), found);
}

/* All (I, O) arrays are contiguous. B: the weights, whose nonzeros are the support. residual: on return 0 elsewhere. support: a bit each,
   [16 outputs][input], for whole panels. norm (O,): the squared norms of the residual. direction: the residual, as many lanes as
   gram_packed_size tells. */
void conjugate_start(
    const float *B, float *residual, long inputs, long outputs, uint16_t *support, float *norm, uint32_t *direction, int num_threads)
{
    long pairs = (inputs + 1) / 2;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (long output = 0; output < panels_of(outputs) * PANEL; output += 16) {
        uint16_t *kept = support + output / 16 * inputs;
        __mmask16 lanes = first(outputs - output);
        __m512 sum = _mm512_setzero_ps();
        for (long input = 0; input < inputs; input += 2) {
            __m512 here[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int j = 0; j < 2 && input + j < inputs; j++) {
                long at = (input + j) * outputs + output;
                kept[input + j] = _mm512_cmp_ps_mask(_mm512_maskz_loadu_ps(lanes, B + at), _mm512_setzero_ps(), _CMP_NEQ_UQ);
                here[j] = _mm512_maskz_loadu_ps(kept[input + j], residual + at);
                _mm512_mask_storeu_ps(residual + at, lanes, here[j]);
                sum = _mm512_fmadd_ps(here[j], here[j], sum);
            }
            store_pair(packed_at(direction, pairs, input / 2, output), here[0], here[1]);
        }
        _mm512_mask_storeu_ps(norm + output, lanes, sum);
    }
}

/* One step of all outputs: changes all but product (I, O), which is A times the direction, and support. */
void conjugate_step(
    float *B, float *residual, const float *product, long inputs, long outputs, const uint16_t *support, float *norm,
    uint32_t *direction, int num_threads)
{
    long pairs = (inputs + 1) / 2;
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (long output = 0; output < panels_of(outputs) * PANEL; output += 16) {
        const uint16_t *kept = support + output / 16 * inputs;
        uint32_t *along = packed_at(direction, pairs, 0, output);
        __mmask16 lanes = first(outputs - output);
        __m512 curvature[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (long pair = 0; pair < pairs; pair++) {
            const float *of = product + 2 * pair * outputs + output;
            __mmask16 odd = 2 * pair + 1 < inputs ? lanes : 0; /* the last pair may be half a pair */
            __m512i d = _mm512_loadu_si512(along + pair * PANEL);
            curvature[0] = _mm512_fmadd_ps(even_of(d), _mm512_maskz_loadu_ps(lanes, of), curvature[0]);
            curvature[1] = _mm512_fmadd_ps(odd_of(d), _mm512_maskz_loadu_ps(odd, of + outputs), curvature[1]);
        }
        __m512 last = _mm512_maskz_loadu_ps(lanes, norm + output);
        __m512 step = ratio(last, _mm512_add_ps(curvature[0], curvature[1])), sum = _mm512_setzero_ps();
        for (long input = 0; input < inputs; input++) {
            long at = input * outputs + output;
            __m512i d = _mm512_loadu_si512(along + input / 2 * PANEL);
            __m512 weight = _mm512_fmadd_ps(step, input % 2 ? odd_of(d) : even_of(d), _mm512_maskz_loadu_ps(lanes, B + at));
            _mm512_mask_storeu_ps(B + at, lanes, weight);
            __m512 moved = _mm512_maskz_loadu_ps(kept[input], product + at);
            __m512 left = _mm512_fnmadd_ps(step, moved, _mm512_maskz_loadu_ps(lanes, residual + at));
            _mm512_mask_storeu_ps(residual + at, lanes, left);
            sum = _mm512_fmadd_ps(left, left, sum);
        }
        _mm512_mask_storeu_ps(norm + output, lanes, sum);
        __m512 share = ratio(sum, last);
        for (long pair = 0; pair < pairs; pair++) {
            const float *of = residual + 2 * pair * outputs + output;
            __mmask16 odd = 2 * pair + 1 < inputs ? lanes : 0;
            __m512i d = _mm512_loadu_si512(along + pair * PANEL);
            store_pair(
                along + pair * PANEL, _mm512_fmadd_ps(share, even_of(d), _mm512_maskz_loadu_ps(lanes, of)),
                _mm512_fmadd_ps(share, odd_of(d), _mm512_maskz_loadu_ps(odd, of + outputs)));
        }
    }
}

#endif
