/* What lies between the products of a decoder layer, in bfloat16, each in one pass over memory, rounding where PyTorch's operations do.

   Letters: B batch, H heads, T tokens, D features, E features of a head. */

#include <math.h>

#include "vectors.h"

/* output (T, D) = weight o bfloat16(x / sqrt(mean of x^2 + eps)), the mean over the features of a token; D is a multiple of LANES. */
void rms_norm(const uint16_t *x, const uint16_t *weight, long tokens, long width, float eps, uint16_t *output, int num_threads)
{
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (long token = 0; token < tokens; token++) {
        const uint16_t *row = x + token * width;
        floats squares = {0};
        for (long i = 0; i < width; i += LANES)
            squares += load(row + i) * load(row + i);
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++)
            sum += squares[lane];
        float scale = 1 / sqrtf(sum / width + eps);
        for (long i = 0; i < width; i += LANES)
            store(output + token * width + i, load(weight + i) * rounded(load(row + i) * scale));
    }
}

/* output = bfloat16(gate / (1 + exp(-gate))) o up, `count` numbers each, a multiple of LANES. */
void silu_product(const uint16_t *gate, const uint16_t *up, long count, uint16_t *output, int num_threads)
{
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (long i = 0; i < count; i += LANES) {
        floats x = load(gate + i);
        floats exponent = x * -LOG2E;
        exponent = blend(exponent > 126, (floats){0} + 126, exponent);
        store(output + i, rounded(x / (1 + power_of_two(exponent))) * load(up + i));
    }
}

/* output (B, T, H, E) = x o cos + (-second half of x, first half of x) o sin, for x (B, H, T, E) with the first three `strides` given, and
   cos and sin (T, E), those of the next of B `step` further on; E is a multiple of 2 LANES. */
void rotate(
    const uint16_t *x, const long *strides, const uint16_t *cos, const uint16_t *sin, long step, long batch, long heads, long tokens,
    long width, uint16_t *output, int num_threads)
{
    long half = width / 2;
#pragma omp parallel for collapse(2) num_threads(num_threads) schedule(static)
    for (long row = 0; row < batch; row++)
        for (long token = 0; token < tokens; token++) {
            const uint16_t *c = cos + row * step + token * width, *s = sin + row * step + token * width;
            for (long head = 0; head < heads; head++) {
                const uint16_t *from = x + row * strides[0] + head * strides[1] + token * strides[2];
                uint16_t *to = output + ((row * tokens + token) * heads + head) * width;
                for (long i = 0; i < half; i += LANES) {
                    long j = half + i;
                    floats a = load(from + i), b = load(from + j);
                    store(to + i, rounded(a * load(c + i)) - rounded(b * load(s + i)));
                    store(to + j, rounded(b * load(c + j)) + rounded(a * load(s + j)));
                }
            }
        }
}
