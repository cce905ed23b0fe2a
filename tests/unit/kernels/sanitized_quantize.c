/* The operations of quantization on odd sizes, in buffers of exactly the size that they may touch.
 *
 * Built and run by test_sanitized.py. Prints what breaks a rule; returns how much that was.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../../compress/kernels/native/quantize.h"

int ck_best_level(void);
int ck_set_level(int level);
int ck_feedback(const float *, const float *, const float *, const float *, const int64_t *, const float *, uint8_t *,
                double *, const int64_t *, int);
int ck_improve_codes(const float *, const float *, const float *, const float *, const int64_t *, const float *,
                     uint8_t *, const int64_t *, int);
int ck_improve_scales(const float *, const uint8_t *, const float *, const float *, const float *, float *,
                      const int64_t *, int);
int ck_searched_ranges(const float *, const float *, const float *, const float *, float *, const int64_t *, int);
int ck_entry_sums(const float *, const float *, const float *, const float *, double *, const int64_t *, int);
int ck_block_maxima(const float *, float *, const int64_t *, int);
int ck_quantize(const float *, const float *, const float *, uint8_t *, float *, const int64_t *, int);
int ck_menu_errors(const float *, const float *, const float *, const int32_t *, const float *, const int64_t *,
                   double *, double *, const int64_t *, int);
int ck_importance_sums(const float *, const float *, const float *, double *, const int64_t *, int);

static uint32_t state = 1;
static int wrong = 0;
static void *taken[64];
static int count_taken = 0;

static void *taking(int64_t size) { return taken[count_taken++] = malloc((size_t)size + !size); }

static float number(void) { return (float)((state = state * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f; }

static float *floats(int64_t count) {
    float *p = taking(count * 4);
    for (int64_t i = 0; i < count; i++) p[i] = number();
    return p;
}

static void expect(int holds, const char *what, const int64_t *sizes) {
    if (holds) return;
    wrong++;
    printf("%s: level %d, %lld x %lld, blocks of %lld, %lld entries\n", what, ck_level(), (long long)sizes[0],
           (long long)sizes[1], (long long)sizes[2], (long long)sizes[3]);
}

static int below(const uint8_t *codes, int64_t count, int64_t entries) {
    for (int64_t i = 0; i < count; i++)
        if (codes[i] >= entries) return 0;
    return 1;
}

static int finite(const float *values, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (!isfinite(values[i])) return 0;
    return 1;
}

static void round_all(int64_t rows, int64_t columns, int64_t size, int64_t bits, int threads) {
    int64_t blocks = ck_ceil_div(columns, size), entries = (int64_t)1 << bits;
    int64_t sizes[] = {rows, columns, size, entries, bits};
    float *weights = floats(rows * columns), *scales = taking(rows * blocks * 4), *table = taking(entries * 4);
    for (int64_t i = 0; i < entries; i++) table[i] = 2.0f * (float)i / (float)(entries - 1) - 1.0f;
    for (int64_t i = 0; i < rows * columns; i += 7) weights[i] = 0;
    ck_block_maxima(weights, scales, sizes, threads);
    expect(finite(scales, rows * blocks), "maxima not finite", sizes);
    scales[0] = 0; /* a block without a scale */

    float *steps = floats(columns * columns), *gram = floats(columns * columns), *diagonal = floats(columns);
    int64_t *order = taking(columns * 8);
    for (int64_t i = 0; i < columns; i++) {
        order[i] = columns - 1 - i;
        diagonal[i] = gram[i * columns + i] = 10.0f + (float)columns;
        for (int64_t j = 0; j < columns; j++) {
            gram[j * columns + i] = gram[i * columns + j];
            steps[i * columns + j] /= (float)columns;
        }
    }
    uint8_t *codes = taking(rows * columns);
    double *errors = taking(rows * 8);
    ck_feedback(weights, scales, steps, diagonal, order, table, codes, errors, sizes, threads);
    expect(below(codes, rows * columns, entries), "feedback gives codes without entries", sizes);
    int64_t twice[] = {rows, columns, size, entries, 2};
    ck_improve_codes(weights, scales, gram, diagonal, order, table, codes, twice, threads);
    expect(below(codes, rows * columns, entries), "descent gives codes without entries", sizes);
    float *better = taking(rows * blocks * 4);
    ck_improve_scales(weights, codes, scales, gram, table, better, sizes, threads);
    expect(finite(better, rows * blocks), "scales not finite", sizes);
    float shares[] = {1.0f, 0.8f, 0.6f};
    int64_t three[] = {rows, columns, size, entries, 3};
    ck_searched_ranges(weights, diagonal, table, shares, better, three, threads);
    expect(finite(better, rows * blocks), "ranges not finite", sizes);

    uint8_t *packed = taking(rows * blocks * size * bits / 8);
    float *values = taking(rows * columns * 4);
    ck_quantize(weights, scales, table, packed, NULL, sizes, threads);
    ck_quantize(weights, scales, table, NULL, values, sizes, threads);
    expect(finite(values, rows * columns), "values not finite", sizes);

    float *tables = taking(CK_TABLES * 256 * 4), *element_weights = floats(rows * columns);
    int64_t lengths[CK_TABLES] = {entries, 0, 0, 2};
    int32_t uses[] = {9};
    for (int64_t i = 0; i < 256; i++) tables[i] = table[ck_min(i, entries - 1)];
    tables[3 * 256] = -1, tables[3 * 256 + 1] = 1;
    double *squares = taking(CK_TABLES * rows * 8), *sums = taking(CK_TABLES * rows * 8);
    int64_t one[] = {rows, columns, size, 1};
    ck_menu_errors(weights, element_weights, scales, uses, tables, lengths, squares, sums, one, threads);
    ck_menu_errors(weights, NULL, scales, uses, tables, lengths, squares, sums, one, threads);
    expect(squares[0] >= 0 && squares[rows] == 0, "errors of tables nobody asked for", sizes);
    while (count_taken) free(taken[--count_taken]);
}

static void fit(int64_t count, int64_t size, int threads) {
    int64_t sizes[] = {count, size, 2, 8};
    float *values = floats(count * size), *scales = floats(count), *weights = floats(2 * size), table[8];
    double *sums = taking(ck_ceil_div(count, CK_FIT_CHUNK) * 16 * 8);
    for (int i = 0; i < 8; i++) table[i] = (float)i / 4.0f - 1.0f;
    ck_entry_sums(values, scales, weights, table, sums, sizes, threads);
    while (count_taken) free(taken[--count_taken]);
}

static void importance(int64_t rows, int64_t columns, int64_t rank, int threads) {
    float *weights = floats(rows * columns), *left = floats(rows * 3 * rank), *right = floats(3 * rank * columns);
    double totals[2] = {0, 0};
    for (int64_t over_columns = 0; over_columns < 2; over_columns++) {
        int64_t sizes[] = {rows, columns, rank, over_columns, over_columns}, count = over_columns ? columns : rows;
        sizes[3] = 1;
        double *sums = taking(count * 8);
        ck_importance_sums(weights, left, right, sums, sizes, threads);
        for (int64_t i = 0; i < count; i++) totals[over_columns] += sums[i];
        if (over_columns)
            expect(fabs(totals[0] - totals[1]) <= 1e-4 * totals[0], "rows and columns do not add up alike", sizes);
    }
    while (count_taken) free(taken[--count_taken]);
}

int main(void) {
    int64_t widths[] = {2, 3, 4, 8};
    for (int level = 0; level <= ck_best_level(); level++) {
        ck_set_level(level);
        for (int i = 0; i < 4; i++) {
            round_all(1, 1, 8, widths[i], 1);
            round_all(3, 37, 16, widths[i], 1);
            round_all(65, 75, 24, widths[i], 2);
            round_all(130, 64, 64, widths[i], 2);
        }
        fit(1, 1, 1);
        fit(600, 24, 2);
        importance(1, 1, 1, 1);
        importance(5, 300, 3, 1);
        importance(130, 513, 4, 2);
    }
    printf("%d wrong\n", wrong);
    return wrong != 0;
}
