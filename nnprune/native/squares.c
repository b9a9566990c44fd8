/* Sums over tokens of the squares of bfloat16 activations, in float32, reading them once.

   Letters: T tokens, I features. */

#include "native.h"

#define FEATURES 64
#define TOKENS 64               /* summed by themselves first: short sums lose fewer digits */

/* total (I,) += the squared norms of the columns of X (T, I), whose tokens are `stride` apart. */
void add_squares(const uint16_t *X, long tokens, long features, long stride, float *total, int num_threads)
{
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (long feature = 0; feature < features; feature += FEATURES) {
        int width = features - feature < FEATURES ? features - feature : FEATURES;
        for (long first = 0; first < tokens; first += TOKENS) {
            long last = first + TOKENS < tokens ? first + TOKENS : tokens;
            float sum[FEATURES] = {0};
            for (long token = first; token < last; token++) {
                const uint16_t *from = X + token * stride + feature;
                for (int i = 0; i < width; i++) {
                    union { uint32_t bits; float value; } x = {(uint32_t)from[i] << 16};
                    sum[i] += x.value * x.value;
                }
            }
            for (int i = 0; i < width; i++)
                total[feature + i] += sum[i];
        }
    }
}
