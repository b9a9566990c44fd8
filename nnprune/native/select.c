/* Which scores of a group are the largest, without sorting. Of a long group the k-th smallest score is found by counting the leading digits
   of all, then those of the scores that share the k-th one's, until few are left; in a short one each score is compared with each other.

   Letters: G groups. */

#include "vectors.h"

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

/* LANES short groups at once, each in a lane. */
static inline __attribute__((always_inline)) void keep_lanes(
    const float *scores, int groups, int n, const int m, uint8_t *kept, uint8_t *spoilt)
{
    floats score[MOST_M] = {{0}};
    ints keep[MOST_M], num_kept = {0};
    for (int group = 0; group < groups; group++)
        for (int i = 0; i < m; i++)
            score[i][group] = scores[group * m + i];
    for (int i = 0; i < m; i++) {
        ints larger = {0};
        for (int j = 0; j < m; j++)
            larger -= score[j] > score[i];
        keep[i] = larger < n;
        num_kept -= keep[i];
    }
    for (int group = 0; group < groups; group++) {
        for (int i = 0; i < m; i++)
            kept[group * m + i] = keep[i][group] != 0;
        spoilt[group] = num_kept[group] != n;
    }
}

/* kept (G, m): 1 for scores (G, m), contiguous, of which fewer than n in their group are larger; m is at most MOST_M. spoilt (G,): 1 where
   ties or NaNs make that more than n. */
void keep_in_groups(const float *scores, long groups, int n, int m, uint8_t *kept, uint8_t *spoilt, int num_threads)
{
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (long group = 0; group < groups; group += LANES) {
        int here = groups - group < LANES ? groups - group : LANES;
        const float *from = scores + group * m;
        if (m == 4)
            keep_lanes(from, here, n, 4, kept + group * m, spoilt + group);
        else if (m == 8)
            keep_lanes(from, here, n, 8, kept + group * m, spoilt + group);
        else
            keep_lanes(from, here, n, m, kept + group * m, spoilt + group);
    }
}
