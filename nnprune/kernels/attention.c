/* Causal attention of bfloat16 sequences: scores and weights stay in the nearest caches.

   A few rows of queries meet all keys before them: their scores, exact products summed in float32; the softmax in float32; its
   weights, as factors of the values rounded to bfloat16 before they are divided by their sum, which is that of the rounded ones: so
   a token that takes nearly all is not taken for less or more.

   Letters: B batch, H heads, K heads of keys and values, T tokens, E features of a head of queries and keys, V of values. */

#include "tile.h"

#ifdef BF16

#define ROWS 6                  /* of queries at a time; times 64 keys or features: 24 accumulators of 32 registers */
#define BLOCKS 16               /* of ROWS queries in a task of a thread */
#define KEYS 64                 /* of a block: four vectors */
#define LOG2E 1.44269504f

typedef struct {
    const uint16_t *data;
    long batch, head, token;    /* strides; features lie side by side */
} Input;

/* 2^x for x <= 0, to 4e-6 of it: far less than what is lost when it becomes bfloat16. A polynomial through the Chebyshev nodes of
   what rounding x leaves. NaN stays NaN. */
static inline __m512 power_of_two(__m512 x)
{
    __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(.00966636837f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(.0559219755f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(.240223497f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(.693121016f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(p, n);
}

/* Tokens, rounded up to whole blocks. */
static inline long padded(long tokens) { return (tokens + KEYS - 1) / KEYS * KEYS; }

/* Keys of a head as [block of keys][pair of features][key], zero beyond the last. */
static void pack_keys(const uint16_t *keys, long stride, long tokens, long width, uint32_t *packed)
{
    for (long start = 0; start < tokens; start += KEYS, packed += width / 2 * KEYS)
        for (long key = 0; key < KEYS; key++)
            for (long pair = 0; pair < width / 2; pair++)
                packed[pair * KEYS + key] = start + key < tokens ? ((const uint32_t *)(keys + (start + key) * stride))[pair] : 0;
}

/* Two tokens of a feature side by side, as [pair of tokens][feature], zero beyond the last token; `width` is a multiple of 16. */
static void pack_pairs(const uint16_t *from, long step, long tokens, long width, uint32_t *to)
{
    for (long token = 0; token < padded(tokens); token += 2, from += 2 * step)
        for (long e = 0; e < width; e += 16, to += 16) {
            __mmask16 even = token < tokens ? 0xffff : 0, odd = token + 1 < tokens ? 0xffff : 0;
            __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, from + e));
            __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, from + step + e));
            _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

/* Scores (ROWS, KEYS), rows `stride` apart, of packed queries [pair of features][row] with a block of keys. */
static inline void score_block(const uint32_t *queries, const uint32_t *keys, long pairs, float *scores, long stride)
{
    __m512 sum[ROWS][4];
    clear_tile(sum, ROWS, 4);
    add_tile(queries, 1, ROWS, keys, KEYS, pairs, sum, ROWS, 4);
    store_tile(sum, scores, stride, ROWS, 4);
}

/* Turns the first `seen` scores of a row into weights, pairs of bfloat16 in their place, not divided by their sum yet, and those up
   to `end`, a multiple of 32, into zeros. Returns the sum of the weights. */
static float weigh(float *scores, long seen, long end, float scaling)
{
    __m512 top = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps(), scale = _mm512_set1_ps(LOG2E * scaling);
    __m512i odd = _mm512_set1_epi32(0xffff0000);
    for (long j = 0; j < seen; j += 16)
        top = _mm512_mask_max_ps(top, first(seen - j), top, _mm512_loadu_ps(scores + j));
    top = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(top)), scale);
    for (long j = 0; j < end; j += 32) {
        __m512 x[2];
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) {
            x[part] = _mm512_fmsub_ps(_mm512_loadu_ps(scores + j + 16 * part), scale, top);
            x[part] = _mm512_maskz_mov_ps(first(seen - j - 16 * part), power_of_two(x[part]));
        }
        __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
        sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
        sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_and_si512(pairs, odd)));
        _mm512_storeu_si512(scores + j / 2, pairs);
    }
    return _mm512_reduce_add_ps(sum);
}

/* output (rows, 16 x parts) = weights (ROWS, pairs of keys) times values (pairs of keys, 16 x parts), each row divided by its sum. */
static inline __attribute__((always_inline)) void mix(
    const uint32_t *weights, long stride, const uint32_t *values, long width, long pairs, const float *sums, int rows,
    uint16_t *output, long output_stride, const int parts)
{
    __m512 sum[ROWS][4];
    clear_tile(sum, ROWS, parts);
    add_tile(weights, stride, 1, values, width, pairs, sum, ROWS, parts);
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            if (row < rows) {
                __m256bh rounded = _mm512_cvtneps_pbh(_mm512_div_ps(sum[row][part], _mm512_set1_ps(sums[row])));
                _mm256_storeu_si256((__m256i *)(output + row * output_stride + 16 * part), (__m256i)rounded);
            }
}

/* Lanes of memory that `attention` needs: for all packed keys of some width, or values, and for a thread. */
long attention_packed_size(long batch, long key_heads, long tokens, long width)
{
    return batch * key_heads * padded(tokens) * width / 2;
}

long attention_thread_size(long tokens, long width) { return ROWS * padded(tokens) + ROWS * width / 2; }

/* softmax(scaling Q K^T, over the keys up to each query's own place) V, as output (B, T, H, V), contiguous.

   E is even, V a multiple of 16, scaling positive. `keys`, `values` and `room` are memory, see above. */
void attention(
    const uint16_t *query, const long *query_strides, const uint16_t *key, const long *key_strides, const uint16_t *value,
    const long *value_strides, uint16_t *output, long batch, long heads, long key_heads, long tokens, long width,
    long value_width, float scaling, uint32_t *keys, uint32_t *values, float *room, int num_threads)
{
    long length = padded(tokens), pairs = width / 2, shared = heads / key_heads;
    long tasks = (tokens + ROWS * BLOCKS - 1) / (ROWS * BLOCKS);
    Input q = {query, query_strides[0], query_strides[1], query_strides[2]};
    Input k = {key, key_strides[0], key_strides[1], key_strides[2]};
    Input v = {value, value_strides[0], value_strides[1], value_strides[2]};
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for collapse(2) schedule(dynamic)
        for (long row = 0; row < batch; row++)
            for (long head = 0; head < key_heads; head++) {
                long at = row * key_heads + head;
                pack_keys(k.data + row * k.batch + head * k.head, k.token, tokens, width, keys + at * length * pairs);
                pack_pairs(
                    v.data + row * v.batch + head * v.head, v.token, tokens, value_width, values + at * length / 2 * value_width);
            }
        float *scores = room + omp_get_thread_num() * attention_thread_size(tokens, width);
        uint32_t *queries = (uint32_t *)(scores + ROWS * length);
#pragma omp for collapse(3) schedule(dynamic)
        for (long row = 0; row < batch; row++)
            for (long head = 0; head < heads; head++)
                for (long task = tasks - 1; task >= 0; task--) { /* the long ones first */
                    long at = row * key_heads + head / shared;
                    const uint32_t *own_keys = keys + at * length * pairs;
                    const uint32_t *own_values = values + at * length / 2 * value_width;
                    long stop = (task + 1) * ROWS * BLOCKS < tokens ? (task + 1) * ROWS * BLOCKS : tokens;
                    for (long start = task * ROWS * BLOCKS; start < stop; start += ROWS) {
                        int rows = stop - start < ROWS ? stop - start : ROWS;
                        for (int r = 0; r < ROWS; r++) {
                            long token = start + (r < rows ? r : 0);
                            const uint16_t *from = q.data + row * q.batch + head * q.head + token * q.token;
                            for (long pair = 0; pair < pairs; pair++)
                                queries[pair * ROWS + r] = ((const uint32_t *)from)[pair];
                        }
                        long end = start + rows;
                        for (long j = 0; j < end; j += KEYS)
                            score_block(queries, own_keys + j * pairs, pairs, scores + j, length);
                        float sums[ROWS];
                        for (int r = 0; r < ROWS; r++)
                            sums[r] = weigh(scores + r * length, start + (r < rows ? r : 0) + 1, (end + 31) / 32 * 32, scaling);
                        uint16_t *to = output + ((row * tokens + start) * heads + head) * value_width;
                        const uint32_t *weights = (const uint32_t *)scores;
                        long stride = heads * value_width, key_pairs = (end + 1) / 2, e = 0;
                        for (; e + 64 <= value_width; e += 64)
                            mix(weights, length, own_values + e, value_width, key_pairs, sums, rows, to + e, stride, 4);
                        for (; e < value_width; e += 16)
                            mix(weights, length, own_values + e, value_width, key_pairs, sums, rows, to + e, stride, 1);
                    }
                }
    }
}

#endif
