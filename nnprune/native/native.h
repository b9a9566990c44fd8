/* What the kernels share. */

#include <omp.h>
#include <stdint.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#define BF16 1                  /* this processor multiplies bfloat16 */
#endif
