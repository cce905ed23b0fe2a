/* LoRA-guided importance of a matrix's elements, summed over rows or columns; nothing of the matrix's size is stored.
 *
 * G = left right and W = W0 + scaled B A are made for four rows and two vectors of columns at a time, in registers.
 */
#include <stdlib.h>

#include "lanes.h"
#include "quantize.h"

#define STRIP CK_STRIP /* columns whose factors stay in the inner cache */
#define GROUP 4        /* rows at a time */
#define FLUSH 64       /* rows whose importance is added up in float32 */

/* The strip's columns of the three right factors, [3 R][STRIP], zeros after the last column. */
static void read_factors(const ck_importance *m, int64_t column, int64_t count, float *to) {
    for (int64_t t = 0; t < 3 * m->rank; t++) {
        memcpy(to + t * STRIP, m->right + t * m->columns + column, (size_t)count * sizeof *to);
        for (int64_t at = count; at < STRIP; at++) to[t * STRIP + at] = 0;
    }
}

/* Importance of GROUP rows in two vectors of columns. */
static inline void importance_of(const ck_importance *m, const float *const *weights, const float *const *left,
                                 const float *right, lanes found[GROUP][2]) {
    lanes gradient[GROUP][2], merged[GROUP][2];
    EACH_OF_16 for (int row = 0; row < GROUP; row++)
        EACH_OF_16 for (int v = 0; v < 2; v++) gradient[row][v] = every(0), merged[row][v] = load(weights[row] + v * LANES);
    for (int64_t t = 0; t < m->rank; t++) {
        const float *factor = right + t * STRIP;
        lanes first[2], second[2], a[2];
        EACH_OF_16 for (int v = 0; v < 2; v++) {
            first[v] = load(factor + v * LANES);
            second[v] = load(factor + m->rank * STRIP + v * LANES);
            a[v] = load(factor + 2 * m->rank * STRIP + v * LANES);
        }
        EACH_OF_16 for (int row = 0; row < GROUP; row++) {
            const float *own = left[row] + t;
            EACH_OF_16 for (int v = 0; v < 2; v++) {
                gradient[row][v] = multiply_add(every(own[0]), first[v], gradient[row][v]);
                gradient[row][v] = multiply_add(every(own[m->rank]), second[v], gradient[row][v]);
                merged[row][v] = multiply_add(every(own[2 * m->rank]), a[v], merged[row][v]);
            }
        }
    }
    EACH_OF_16 for (int row = 0; row < GROUP; row++)
        EACH_OF_16 for (int v = 0; v < 2; v++) {
            lanes product = gradient[row][v] * merged[row][v], size = absolute(product);
            if (m->square) size = product * product;
            found[row][v] = size;
        }
}

/* A strip of rows begin to end; where it is asked for, sums are added to [O] or [STRIP]. */
static void importance_of_strip(const ck_importance *m, int64_t begin, int64_t end, int64_t column,
                                const float *right, double *row_sums, double *column_sums) {
    float ends[GROUP][2 * LANES] = {{0}}, summed[STRIP] = {0};
    int64_t count = ck_min(STRIP, m->columns - column), whole = count / (2 * LANES) * 2 * LANES;
    for (int64_t row = begin; row < end; row += GROUP) {
        const float *weights[GROUP], *left[GROUP];
        int here = (int)ck_min(GROUP, end - row);
        double sums[GROUP] = {0};
        for (int r = 0; r < GROUP; r++) { /* rows after the last repeat it, and are left out of the sums */
            int64_t own = ck_min(row + r, end - 1);
            weights[r] = m->weights + own * m->columns + column;
            left[r] = m->left + own * 3 * m->rank;
            if (whole < count) memcpy(ends[r], weights[r] + whole, (size_t)(count - whole) * sizeof(float));
        }
        lanes total[GROUP];
        for (int r = 0; r < GROUP; r++) total[r] = every(0);
        for (int64_t at = 0; at < count; at += 2 * LANES) {
            const float *from[GROUP];
            lanes found[GROUP][2];
            for (int r = 0; r < GROUP; r++) from[r] = at < whole ? weights[r] + at : ends[r];
            importance_of(m, from, left, right + at, found);
            for (int r = 0; r < GROUP; r++) total[r] = total[r] + (found[r][0] + found[r][1]);
            for (int v = 0; column_sums && v < 2; v++) {
                float *to = summed + at + v * LANES;
                lanes sum = load(to);
                for (int r = 0; r < here; r++) sum = sum + found[r][v];
                store(to, sum);
            }
        }
        for (int r = 0; row_sums && r < here; r++) {
            float each[LANES];
            store(each, total[r]);
            for (int lane = 0; lane < LANES; lane++) sums[r] += each[lane];
            row_sums[row + r] += sums[r];
        }
        if (column_sums && (row + GROUP >= end || (row - begin) % FLUSH == FLUSH - GROUP))
            for (int64_t at = 0; at < STRIP; at++) column_sums[at] += summed[at], summed[at] = 0;
    }
}

/* Sums over each of the rows begin to end. */
static void importance_by_rows(void *argument, int64_t begin, int64_t end) {
    ck_importance *m = argument;
    float *right = malloc((size_t)(3 * m->rank * STRIP) * sizeof *right);
    if (!right) m->failed = 1;
    for (int64_t row = begin; row < end; row++) m->sums[row] = 0;
    for (int64_t column = 0; right && column < m->columns; column += STRIP) {
        read_factors(m, column, ck_min(STRIP, m->columns - column), right);
        importance_of_strip(m, begin, end, column, right, m->sums, NULL);
    }
    free(right);
}

/* Sums over each of the columns of strips begin to end. */
static void importance_by_columns(void *argument, int64_t begin, int64_t end) {
    ck_importance *m = argument;
    float *right = malloc((size_t)(3 * m->rank * STRIP) * sizeof *right);
    if (!right) m->failed = 1;
    for (int64_t strip = begin; right && strip < end; strip++) {
        double sums[STRIP] = {0};
        int64_t column = strip * STRIP, count = ck_min(STRIP, m->columns - column);
        read_factors(m, column, count, right);
        importance_of_strip(m, 0, m->rows, column, right, NULL, sums);
        memcpy(m->sums + column, sums, (size_t)count * sizeof *sums);
    }
    free(right);
}
