/* SparseGPT's sweep of one column block (Frantar & Alistarh 2023, arXiv:2301.00774). For each column j in order

       error_j = where(dropped, w_j, 0) / U_jj,    w_l -= U_jl error_j  for all l > j,

   or, with scales, error_j = (w_j - q_j) / U_jj with q_j = where(dropped, 0, s_j clamp(round(w_j / s_j), -most, most)).

   Output features do not depend on each other: a thread takes a few of them, whose block stays in its nearest cache, through all
   columns. Errors reach the columns of their own sub-block at once, and later ones together.

   Letters: C columns of a block, O output features. */

#include <math.h>

#include "vectors.h"

#define VECTORS 2
#define OUTPUTS (LANES * VECTORS)
#define MOST_COLUMNS 512
#define MOST_M 32               /* inputs of a pattern's group */
#define WHOLE 12582912.f        /* 1.5 x 2^23: float32 has no fractions there, so adding it rounds to nearest, ties to even */

/* Which of m columns of some output features go: the m - n of lowest cost (w_j / U_jj)^2, of equal ones the later. A cost of NaN
   counts as infinite. */
static void choose(floats weight[][VECTORS], const float *U, long columns, long first, int n, int m, ints drop[][VECTORS])
{
    floats cost[MOST_M];
    for (int part = 0; part < VECTORS; part++) {
        for (int j = 0; j < m; j++) {
            floats root = weight[first + j][part] / U[(first + j) * (columns + 1)];
            cost[j] = blend(root == root, root * root, (floats){0} + INFINITY);
        }
        for (int j = 0; j < m; j++) {
            ints lower = {0}; /* minus the number of those that go before j */
            for (int k = 0; k < j; k++)
                lower += cost[k] < cost[j];
            for (int k = j + 1; k < m; k++)
                lower += cost[k] <= cost[j];
            drop[first + j][part] = -lower < (m - n);
        }
    }
}

/* The nearest multiple of a scale with a factor of at most `most`; NaN stays NaN. */
static inline floats on_grid(floats weight, floats scale, float most)
{
    floats level = weight / scale, highest = (floats){0} + most;
    level = blend(level > highest, highest, level);
    level = blend(level < -highest, -highest, level);
    return (level + WHOLE - WHOLE) * scale;
}

/* Prunes weight (C, O) in place and writes the errors (C, O) that columns after the block have yet to absorb.

   U (C, C), upper triangular, H^-1 = U^T U. drop (C, O), 1 = remove; or null: keep n of every m columns, each group chosen when its
   first column is reached. scale (C, O), positive, or null: kept weights are not rounded. sub_block: columns, a multiple of m. All
   contiguous. C is at most MOST_COLUMNS, m at most MOST_M, most below 2^22. */
void sweep(
    float *weight_CO, float *errors_CO, const uint8_t *drop_CO, const float *U, const float *scale_CO, long columns, long outputs,
    int n, int m, int most, long sub_block, int num_threads)
{
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
    for (long output = 0; output < outputs; output += OUTPUTS) {
        floats weight[MOST_COLUMNS][VECTORS], error[MOST_COLUMNS][VECTORS];
        ints drop[MOST_COLUMNS][VECTORS];
        size_t lanes = outputs - output < OUTPUTS ? outputs - output : OUTPUTS;
        for (long j = 0; j < columns; j++) {
            if (lanes < OUTPUTS)
                memset(weight[j], 0, sizeof weight[j]);
            memcpy(weight[j], weight_CO + j * outputs + output, lanes * sizeof(float));
            for (size_t lane = 0; drop_CO && lane < lanes; lane++)
                ((int32_t *)drop[j])[lane] = -(int32_t)(drop_CO[j * outputs + output + lane] != 0);
        }
        for (long start = 0; start < columns; start += sub_block) {
            long stop = start + sub_block < columns ? start + sub_block : columns;
            for (long j = start; j < stop; j++) {
                if (!drop_CO && j % m == 0)
                    choose(weight, U, columns, j, n, m, drop);
                floats scale[VECTORS] = {0};
                if (scale_CO)
                    memcpy(scale, scale_CO + j * outputs + output, lanes * sizeof(float));
                for (int part = 0; part < VECTORS; part++) {
                    floats lost = (floats)(drop[j][part] & (ints)weight[j][part]);
                    if (scale_CO) {
                        floats kept = (floats)(~drop[j][part] & (ints)on_grid(weight[j][part], scale[part], most));
                        lost = weight[j][part] - kept;
                        weight[j][part] = kept;
                    }
                    error[j][part] = lost / U[j * (columns + 1)];
                    for (long l = j + 1; l < stop; l++)
                        weight[l][part] -= U[j * columns + l] * error[j][part];
                }
            }
            for (long l = stop; l < columns; l++) {
                floats left[VECTORS];
                memcpy(left, weight[l], sizeof left);
                for (long j = start; j < stop; j++)
                    for (int part = 0; part < VECTORS; part++)
                        left[part] -= U[j * columns + l] * error[j][part];
                memcpy(weight[l], left, sizeof left);
            }
        }
        for (long j = 0; j < columns; j++) {
            for (int part = 0; part < VECTORS; part++)
                weight[j][part] = (floats)(~drop[j][part] & (ints)weight[j][part]);
            memcpy(weight_CO + j * outputs + output, weight[j], lanes * sizeof(float));
            memcpy(errors_CO + j * outputs + output, error[j], lanes * sizeof(float));
        }
    }
}
