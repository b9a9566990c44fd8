/* The gradients of causal attention, from its outputs and the logarithms of its softmax's sums.

   With S = scaling Q K^T, P = exp(S - L) for keys up to each query's own place, L the logarithm of the sum of exp(S), and O = P V,
   a loss with the gradient G of O has (Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithm 2)

       dV = P^T G,    dS = P o (G V^T - D),    dQ = scaling dS K,    dK = scaling dS^T Q,    D = the row sums of G o O.

   Scores are computed again, a block of queries and of keys at a time. P and dS are rounded to bfloat16 as factors; everything is
   summed in float32.

   Letters: B batch, H heads, K heads of keys and values, T tokens, E features of a head. */

#include "attention.h"
#include "tile.h"

#ifdef BF16

#define BLOCK KEYS              /* of queries, or of keys */
#define ROWS 4                  /* of a tile: times 64, 16 accumulators of 32 registers */

/* A head's tensors as the products want them, all tokens padded with zeros to whole blocks. */
typedef struct {
    uint32_t *queries, *grads;                  /* [token][pair of features] */
    uint32_t *query_pairs, *grad_pairs;         /* [pair of tokens][feature] */
    uint32_t *key_pairs;                        /* [pair of tokens][feature] */
    uint32_t *keys, *values;                    /* [block][pair of features][token] */
    float *query_grads;                         /* [token][feature] */
    float *key_grads, *value_grads;             /* of a block: [token][feature] */
    float *inner;                               /* D: [token] */
    uint32_t P[BLOCK / 2 * BLOCK], dS[BLOCK / 2 * BLOCK];       /* of a block: [pair of queries][key] */
    uint32_t dS_rows[BLOCK * BLOCK / 2];                        /* [query][pair of keys] */
} __attribute__((aligned(64))) Head;

/* Lanes of memory that a thread needs for a head. */
long attention_backward_size(long tokens, long width)
{
    return padded(tokens) * (width / 2 * 7 + width + 1) + 2 * BLOCK * width;
}

static void divide(Head *head, uint32_t *room, long tokens, long width)
{
    long half = padded(tokens) * width / 2;
    uint32_t **parts[] = {
        &head->queries, &head->grads, &head->query_pairs, &head->grad_pairs, &head->key_pairs, &head->keys, &head->values};
    for (int part = 0; part < 7; part++, room += half)
        *parts[part] = room;
    head->query_grads = (float *)room;
    head->key_grads = head->query_grads + 2 * half;
    head->value_grads = head->key_grads + BLOCK * width;
    head->inner = head->value_grads + BLOCK * width;
}

static void copy_rows(const uint16_t *from, long step, long tokens, long width, uint32_t *to)
{
    for (long token = 0; token < tokens; token++)
        memcpy(to + token * width / 2, from + token * step, 2 * width);
    memset(to + tokens * width / 2, 0, 2 * width * (padded(tokens) - tokens));
}

/* D of each query: the product of the attention's output and its gradient. */
static void multiply_rows(
    const uint16_t *outputs, long step, const uint16_t *grads, long grad_step, long tokens, long width, float *inner)
{
    memset(inner, 0, 4 * padded(tokens));
    for (long token = 0; token < tokens; token++) {
        __m512 sum = _mm512_setzero_ps();
        for (long e = 0; e < width; e += 16) {
            __m512 o = _mm512_cvtpbh_ps((__m256bh)_mm256_loadu_si256((const __m256i *)(outputs + token * step + e)));
            __m512 g = _mm512_cvtpbh_ps((__m256bh)_mm256_loadu_si256((const __m256i *)(grads + token * grad_step + e)));
            sum = _mm512_fmadd_ps(o, g, sum);
        }
        inner[token] = _mm512_reduce_add_ps(sum);
    }
}

static inline void product(const uint32_t *A, const uint32_t *B, long pairs, float *result)
{
    __m512 sum[ROWS][4];
    clear_tile(sum, ROWS, 4);
    add_tile(A, pairs, 1, B, BLOCK, pairs, sum, ROWS, 4);
    store_tile(sum, result, BLOCK, ROWS, 4);
}

static inline __attribute__((always_inline)) void add_columns(
    const uint32_t *A, long row_step, long pair_step, const uint32_t *B, long width, float *total, const int parts)
{
    __m512 sum[ROWS][4];
    load_tile(sum, total, width, ROWS, parts);
    add_tile(A, row_step, pair_step, B, width, BLOCK / 2, sum, ROWS, parts);
    store_tile(sum, total, width, ROWS, parts);
}

/* total (BLOCK, width) += A (BLOCK, BLOCK) B (BLOCK, width). */
static void add_product(const uint32_t *A, long row_step, long pair_step, const uint32_t *B, long width, float *total)
{
    for (long row = 0; row < BLOCK; row += ROWS, A += ROWS * row_step, total += ROWS * width) {
        long e = 0;
        for (; e + 64 <= width; e += 64)
            add_columns(A, row_step, pair_step, B + e, width, total + e, 4);
        for (; e < width; e += 16)
            add_columns(A, row_step, pair_step, B + e, width, total + e, 1);
    }
}

/* P and dS of a block of queries, from its first, and a block of keys; `is_last`: the queries' own, beyond which they see nothing. */
static void weigh_block(Head *head, long query, long key, long width, float scaling, const float *sums, int is_last)
{
    long pairs = width / 2;
    __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (long row = 0; row < BLOCK; row += ROWS) {
        float scores[ROWS * BLOCK] __attribute__((aligned(64))), grads[ROWS * BLOCK] __attribute__((aligned(64)));
        product(head->queries + (query + row) * pairs, head->keys + key * pairs, pairs, scores);
        product(head->grads + (query + row) * pairs, head->values + key * pairs, pairs, grads);
        for (int pair = 0; pair < ROWS; pair += 2)
            for (long j = 0; j < BLOCK; j += 16) {
                __m512 p[2], s[2];
                for (int odd = 0; odd < 2; odd++) {
                    long r = row + pair + odd, at = (pair + odd) * BLOCK + j;
                    __m512 score = _mm512_loadu_ps(scores + at), grad = _mm512_loadu_ps(grads + at);
                    score = _mm512_fmsub_ps(score, _mm512_set1_ps(LOG2E * scaling), _mm512_set1_ps(LOG2E * sums[query + r]));
                    p[odd] = _mm512_maskz_mov_ps(is_last ? first(r + 1 - j) : 0xffff, power_of_two(score));
                    s[odd] = _mm512_mul_ps(p[odd], _mm512_sub_ps(grad, _mm512_set1_ps(head->inner[query + r])));
                }
                __m512i P = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]), dS = (__m512i)_mm512_cvtne2ps_pbh(s[1], s[0]);
                long at = (row + pair) / 2 * BLOCK + j;
                _mm512_storeu_si512(head->P + at, _mm512_permutexvar_epi16(order, P));
                _mm512_storeu_si512(head->dS + at, _mm512_permutexvar_epi16(order, dS));
                uint32_t *rows = head->dS_rows + ((row + pair) * BLOCK + j) / 2;
                _mm256_storeu_si256((__m256i *)rows, _mm512_castsi512_si256(dS));
                _mm256_storeu_si256((__m256i *)(rows + BLOCK / 2), _mm512_extracti64x4_epi64(dS, 1));
            }
    }
}

/* dQ as bfloat16 (B, T, H, E), dK and dV, of every head of queries by itself, as float32 (B, H, T, E), all contiguous.

   `outputs` (B, T, H, E), contiguous, and `sums`, L (B, H, T rounded up to BLOCK, zeros beyond T), are those of `attention`. E is a
   multiple of 16. `room`: see above, for each thread. */
void attention_backward(
    const uint16_t *query, const long *query_strides, const uint16_t *key, const long *key_strides, const uint16_t *value,
    const long *value_strides, const uint16_t *grad, const long *grad_strides, const uint16_t *outputs, const float *sums,
    uint16_t *query_grads, float *key_grads, float *value_grads, long batch, long heads, long key_heads, long tokens, long width,
    float scaling, uint32_t *room, int num_threads)
{
    Input q = {query, query_strides[0], query_strides[1], query_strides[2]};
    Input k = {key, key_strides[0], key_strides[1], key_strides[2]};
    Input v = {value, value_strides[0], value_strides[1], value_strides[2]};
    Input g = {grad, grad_strides[0], grad_strides[1], grad_strides[2]};
#pragma omp parallel for num_threads(num_threads) collapse(2) schedule(dynamic)
    for (long row = 0; row < batch; row++)
        for (long h = 0; h < heads; h++) {
            Head head;
            divide(&head, room + omp_get_thread_num() * attention_backward_size(tokens, width), tokens, width);
            long key_head = h / (heads / key_heads), at = row * heads + h;
            const uint16_t *Q = q.data + row * q.batch + h * q.head, *G = g.data + row * g.batch + h * g.head;
            const uint16_t *K = k.data + row * k.batch + key_head * k.head, *V = v.data + row * v.batch + key_head * v.head;
            copy_rows(Q, q.token, tokens, width, head.queries);
            copy_rows(G, g.token, tokens, width, head.grads);
            pack_pairs(Q, q.token, tokens, width, head.query_pairs);
            pack_pairs(G, g.token, tokens, width, head.grad_pairs);
            pack_pairs(K, k.token, tokens, width, head.key_pairs);
            pack_keys(K, k.token, tokens, width, head.keys);
            pack_keys(V, v.token, tokens, width, head.values);
            const uint16_t *own = outputs + (row * tokens * heads + h) * width;
            multiply_rows(own, heads * width, G, g.token, tokens, width, head.inner);
            memset(head.query_grads, 0, 4 * padded(tokens) * width);
            for (long j = 0; j < tokens; j += BLOCK) {
                memset(head.key_grads, 0, 8 * BLOCK * width);   /* and value_grads */
                for (long i = j; i < tokens; i += BLOCK) {
                    weigh_block(&head, i, j, width, scaling, sums + at * padded(tokens), i == j);
                    add_product(head.P, 1, BLOCK, head.grad_pairs + i * width / 2, width, head.value_grads);
                    add_product(head.dS, 1, BLOCK, head.query_pairs + i * width / 2, width, head.key_grads);
                    add_product(head.dS_rows, BLOCK / 2, 1, head.key_pairs + j * width / 2, width, head.query_grads + i * width);
                }
                long count = (tokens - j < BLOCK ? tokens - j : BLOCK) * width, to = (at * tokens + j) * width;
                memcpy(value_grads + to, head.value_grads, 4 * count);
                for (long e = 0; e < count; e++)
                    key_grads[to + e] = scaling * head.key_grads[e];
            }
            for (long token = 0; token < tokens; token++)
                for (long e = 0; e < width; e += 16) {
                    __m512 grads = _mm512_mul_ps(_mm512_loadu_ps(head.query_grads + token * width + e), _mm512_set1_ps(scaling));
                    uint16_t *to = query_grads + ((row * tokens + token) * heads + h) * width + e;
                    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(grads));
                }
        }
}

#endif
