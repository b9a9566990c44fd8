/* What the kernels share. */

#pragma once

#include <omp.h>
#include <stdint.h>

/* A processor with AMX multiplies bfloat16 faster by its tiles, which PyTorch's products use by themselves. */
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include <immintrin.h>
#define BF16 1

/* The first lanes of a vector. */
static inline __mmask16 first(long count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }
#endif
