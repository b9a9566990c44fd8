/* The search of nnprune/pruners/swaps.py, a row at a time, whose weights stay in the cache: the same steps in the same order.

   Letters: O output features, I input features. */

#include <math.h>

#include "native.h"

#define MOST_AT_ONCE 64         /* swaps of a step */

typedef struct { float change; int u, p; } Swap;

typedef struct { float cost; int column; } Candidate;

typedef struct {
    const float *weight, *hessian;
    uint8_t *mask;
    float *c, *square;              /* (I,): H d, and w_i^2 H_ii */
    Candidate *kept, *pruned;
    float *products;
    long inputs;
} Row;

/* Moves the `most` cheapest to the front, in no order, if there are more. Returns how many are left. */
static long cheapest(Candidate *candidates, long size, long most)
{
    long low = 0, high = size - 1;
    while (size > most && low < high) {
        float pivot = candidates[low + (high - low) / 2].cost;
        long i = low, j = high;
        while (i <= j) {
            while (candidates[i].cost < pivot)
                i++;
            while (pivot < candidates[j].cost)
                j--;
            if (i <= j) {
                Candidate moved = candidates[i];
                candidates[i++] = candidates[j];
                candidates[j--] = moved;
            }
        }
        if (most - 1 <= j)
            high = j;
        else if (most - 1 >= i)
            low = i;
        else
            break;
    }
    return size < most ? size : most;
}

/* Puts a swap among the best `most`, which are in order. Returns how many there are. */
static int insert(Swap *best, int count, int most, Swap swap)
{
    if (count == most) {
        if (!(swap.change < best[most - 1].change))
            return count;
        count--;
    }
    int place = count;
    for (; place > 0 && swap.change < best[place - 1].change; place--)
        best[place] = best[place - 1];
    best[place] = swap;
    return count + 1;
}

/* The best swaps of the group of columns from `first` on, each u with its best p, put among the best of all. */
static int propose(const Row *row, long first, long size, long most_candidates, Swap *best, int count, int most)
{
    long num_kept = 0, num_pruned = 0;
    for (int column = first; column < first + size; column++) {
        float linear = 2 * row->weight[column] * row->c[column];
        if (row->mask[column])
            row->kept[num_kept++] = (Candidate){row->square[column] + linear, column};
        else
            row->pruned[num_pruned++] = (Candidate){row->square[column] - linear, column};
    }
    num_kept = cheapest(row->kept, num_kept, most_candidates);
    num_pruned = cheapest(row->pruned, num_pruned, most_candidates);
    for (long k = 0; k < num_kept; k++) {
        int u = row->kept[k].column;
        const float *hessian = row->hessian + u * row->inputs;
        float twice = -2 * row->weight[u], least = INFINITY;
        for (long i = 0; i < num_pruned; i++) {
            int p = row->pruned[i].column;
            row->products[i] = row->pruned[i].cost + twice * row->weight[p] * hessian[p];
            least = row->products[i] < least ? row->products[i] : least;
        }
        least += row->kept[k].cost;
        if (count == most && !(least < best[most - 1].change))
            continue;
        for (long i = 0; i < num_pruned; i++)
            if (row->products[i] + row->kept[k].cost == least) {
                count = insert(best, count, most, (Swap){least, u, row->pruned[i].column});
                break;
            }
    }
    return count;
}

/* s_i^T H s_j of the steps of two swaps. */
static float interaction(const Row *row, Swap i, Swap j)
{
    const float *w = row->weight, *of_u = row->hessian + i.u * row->inputs, *of_p = row->hessian + i.p * row->inputs;
    return w[i.u] * (w[j.u] * of_u[j.u] - w[j.p] * of_u[j.p]) + w[i.p] * (w[j.p] * of_p[j.p] - w[j.u] * of_p[j.u]);
}

/* Makes the best of the swaps, then the best given it, while they gain. Returns how many. */
static long take(const Row *row, Swap *swaps, int count, float least, long budget)
{
    long taken = 0;
    while (taken < budget) {
        int best = 0;
        for (int i = 1; i < count; i++)
            best = swaps[i].change < swaps[best].change ? i : best;
        if (count == 0 || !(swaps[best].change < -least))
            break;
        Swap swap = swaps[best];
        int left = 0;
        for (int i = 0; i < count; i++)
            if (swaps[i].p != swap.p) { /* what wants the same p is out, and so is this one */
                swaps[left] = swaps[i];
                swaps[left++].change += 2 * interaction(row, swap, swaps[i]);
            }
        count = left;
        const float *of_u = row->hessian + swap.u * row->inputs, *of_p = row->hessian + swap.p * row->inputs;
        float plus = row->weight[swap.u], minus = row->weight[swap.p];
        for (long i = 0; i < row->inputs; i++)
            row->c[i] += plus * of_u[i] - minus * of_p[i];
        row->mask[swap.u] = 0;
        row->mask[swap.p] = 1;
        taken++;
    }
    return taken;
}

/* Numbers of 32 bits that a thread needs. */
long swaps_thread_size(long inputs) { return 2 * inputs + 2 * inputs * (sizeof(Candidate) / sizeof(float)); }

/* Improves mask (O, I) of weight (O, I) in place, in groups of `size` columns. c (O, I) = d H, brought up to date. least (O,): the least
   gain of a swap. room: what `swaps_thread_size` tells, for each thread. */
void search_swaps(
    const float *weight, uint8_t *mask, float *c, const float *hessian, const float *least, float *room, long outputs, long inputs,
    long size, long max_swaps, long most_candidates, int at_once, int num_threads)
{
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 4)
    for (long output = 0; output < outputs; output++) {
        float *square = room + omp_get_thread_num() * swaps_thread_size(inputs);
        Candidate *candidates = (Candidate *)(square + 2 * inputs);
        Row row = {
            weight + output * inputs, hessian, mask + output * inputs, c + output * inputs, square, candidates, candidates + inputs,
            square + inputs, inputs};
        for (long i = 0; i < inputs; i++)
            square[i] = row.weight[i] * row.weight[i] * hessian[i * (inputs + 1)];
        for (long budget = max_swaps, taken = 1; budget > 0 && taken; budget -= taken) {
            Swap best[MOST_AT_ONCE];
            int count = 0;
            for (long first = 0; first < inputs; first += size)
                count = propose(&row, first, size, most_candidates, best, count, at_once);
            taken = take(&row, best, count, least[output], budget);
        }
    }
}
