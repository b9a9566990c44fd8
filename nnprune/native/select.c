/* The k-th smallest score of a group, without sorting: by counting the leading digits of all scores, then those of the scores that share
   the k-th one's, until few are left.

   Letters: G groups. */

#include "native.h"

#define DIGITS 11               /* binary ones at a time: sign, exponent and two of the mantissa first */
#define BINS (1 << DIGITS)
#define FEW 256                 /* candidates that are compared with each other */

#define NOT_A_NUMBER 0xffffffffu

/* Unsigned numbers in the order of the scores, NaN last; both zeros are one. */
static inline uint32_t key_of(float score)
{
    union { float value; uint32_t bits; } x = {score + 0.0f};
    return score == score ? x.bits ^ ((uint32_t)((int32_t)x.bits >> 31) | 0x80000000u) : NOT_A_NUMBER;
}

static inline float score_of(uint32_t key)
{
    union { uint32_t bits; float value; } x = {key >> 31 ? key ^ 0x80000000u : ~key};
    return x.value;
}

/* The bin that holds the k-th smallest, k counted from 1; takes from k what lies in the bins before. */
static inline int bin_of(const uint32_t (*counts)[BINS], long *k)
{
    for (int bin = 0;; bin++) {
        long here = (long)counts[0][bin] + counts[1][bin];
        if (*k <= here)
            return bin;
        *k -= here;
    }
}

/* The k-th smallest of keys, of which it destroys the order; 1 in `is_tied` when its equals are not all among the k smallest. */
static uint32_t kth_key(uint32_t *keys, long count, long k, uint8_t *is_tied)
{
    uint32_t counts[2][BINS];
    for (int shift = 32 - DIGITS; count > FEW; shift = shift > DIGITS ? shift - DIGITS : 0) {
        for (int bin = 0; bin < BINS; bin++)
            counts[0][bin] = counts[1][bin] = 0;
        for (long i = 0; i + 1 < count; i += 2) { /* two counters, or equal neighbours would wait for each other */
            counts[0][keys[i] >> shift & (BINS - 1)]++;
            counts[1][keys[i + 1] >> shift & (BINS - 1)]++;
        }
        if (count % 2)
            counts[0][keys[count - 1] >> shift & (BINS - 1)]++;
        uint32_t bin = bin_of(counts, &k);
        long kept = 0;
        for (long i = 0; i < count; i++) {
            uint32_t key = keys[i];
            keys[kept] = key;
            kept += (key >> shift & (BINS - 1)) == bin;
        }
        count = kept;
        if (shift == 0) { /* all are equal */
            *is_tied = k < count;
            return keys[0];
        }
    }
    for (long i = 0;; i++) {
        long less = 0, equal = 0;
        for (long j = 0; j < count; j++) {
            less += keys[j] < keys[i];
            equal += keys[j] == keys[i];
        }
        if (less < k && k <= less + equal) {
            *is_tied = k < less + equal;
            return keys[i];
        }
    }
}

/* The k-th smallest, 1 <= k <= width, of each group of scores (G, width), contiguous. spoilt (G,): 1 where taking all scores up to it
   would take more than k, or where there is a NaN. room: of `width` keys for each thread. */
void kth_smallest(
    const float *scores, long groups, long width, long k, float *values, uint8_t *spoilt, uint32_t *room, int num_threads)
{
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (long group = 0; group < groups; group++) {
        uint32_t *keys = room + omp_get_thread_num() * width, last = 0;
        for (long i = 0; i < width; i++) {
            keys[i] = key_of(scores[group * width + i]);
            last = keys[i] > last ? keys[i] : last;
        }
        values[group] = score_of(kth_key(keys, width, k, spoilt + group));
        spoilt[group] |= last == NOT_A_NUMBER;
    }
}
