/* Negative log-likelihoods of tokens from bfloat16 logits, in float32, reading a row twice while it is in the cache and writing none.

   Letters: T tokens, V vocabulary. */

#include <math.h>

#include "vectors.h"

/* losses (T,) = log(sum of exp(logits)) - the target's logit, for logits (T, V) whose rows are `stride` apart. */
void negative_log_likelihood(
    const uint16_t *logits, long stride, const int64_t *targets, long tokens, long vocabulary, float *losses, int num_threads)
{
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (long token = 0; token < tokens; token++) {
        const uint16_t *row = logits + token * stride;
        long whole = vocabulary / LANES * LANES;
        uint16_t rest[LANES];
        for (int lane = 0; lane < LANES; lane++)
            rest[lane] = whole + lane < vocabulary ? row[whole + lane] : 0xff80; /* -infinity */
        floats top = load(rest), sum = {0};
        for (long v = 0; v < whole; v += LANES) {
            floats x = load(row + v);
            top = blend(x > top, x, top);
        }
        float largest = top[0], total = 0;
        for (int lane = 1; lane < LANES; lane++)
            largest = top[lane] > largest ? top[lane] : largest;
        for (long v = 0; v < whole; v += LANES)
            sum += power_of_two((load(row + v) - largest) * LOG2E);
        sum += power_of_two((load(rest) - largest) * LOG2E);
        for (int lane = 0; lane < LANES; lane++)
            total += sum[lane];
        union { uint32_t bits; float value; } target = {(uint32_t)row[targets[token]] << 16};
        losses[token] = largest + logf(total) - target.value;
    }
}
