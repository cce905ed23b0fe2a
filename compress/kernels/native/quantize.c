/* The operations of quantization that Python calls, each at the instruction-set level in force.
 *
 * `sizes` holds O, I, the block size, the entries of the table, and one number more where it is named. All return 0,
 * or 1 where memory ran out.
 */
#include "quantize.h"

static const ck_quantizers *quantizers(void) {
#if CK_X86
    if (ck_level() >= CK_AVX512) return &ck_quantize_avx512;
    if (ck_level() == CK_AVX2) return &ck_quantize_avx2;
#endif
    return &ck_quantize_scalar;
}

static ck_rounding with_sizes(const int64_t *sizes, const float *table) {
    return (ck_rounding){.rows = sizes[0],
                         .columns = sizes[1],
                         .block_size = sizes[2],
                         .entries = sizes[3],
                         .table = table};
}

static int by_tiles(ck_rounding *r, int threads, ck_task task) {
    ck_parallel(ck_ceil_div(r->rows, CK_ROWS), 1, threads, task, r);
    return r->failed;
}

/* Codes [O][I] with error feedback, and what the outputs of each row lose [O].
 *
 * `steps` [I][I] is the upper triangular factor in rounding order, each row over its diagonal; `costs` [I] are squares
 * of the reciprocals of that diagonal, by column of the matrix.
 */
CK_EXPORT int ck_feedback(const float *weights, const float *scales, const float *steps, const float *costs,
                          const int64_t *order, const float *table, uint8_t *codes, double *errors,
                          const int64_t *sizes, int threads) {
    ck_rounding r = with_sizes(sizes, table);
    r.weights = weights, r.scales = scales, r.coefficients = steps, r.diagonal = costs, r.order = order;
    r.codes = codes, r.errors = errors;
    return by_tiles(&r, threads, quantizers()->feedback);
}

/* Codes [O][I], in place, after passes (sizes[4]) of coordinate descent; `gram` [I][I] is H. */
CK_EXPORT int ck_improve_codes(const float *weights, const float *scales, const float *gram, const float *diagonal,
                               const int64_t *order, const float *table, uint8_t *codes, const int64_t *sizes,
                               int threads) {
    ck_rounding r = with_sizes(sizes, table);
    r.weights = weights, r.scales = scales, r.coefficients = gram, r.diagonal = diagonal, r.order = order;
    r.codes = codes, r.passes = sizes[4];
    return by_tiles(&r, threads, quantizers()->codes);
}

/* Scales [O][N] with a smaller or equal error of the outputs for the same codes. */
CK_EXPORT int ck_improve_scales(const float *weights, const uint8_t *codes, const float *scales, const float *gram,
                                const float *table, float *found, const int64_t *sizes, int threads) {
    ck_rounding r = with_sizes(sizes, table);
    r.weights = weights, r.scales = scales, r.coefficients = gram, r.new_scales = found;
    r.codes = (uint8_t *)codes; /* read only */
    return by_tiles(&r, threads, quantizers()->scales);
}

/* Of `shares` (sizes[4] of them) times each block's largest weight, the range that loses least, [O][N]. */
CK_EXPORT int ck_searched_ranges(const float *weights, const float *column_weights, const float *table,
                                 const float *shares, float *found, const int64_t *sizes, int threads) {
    ck_rounding r = with_sizes(sizes, table);
    r.weights = weights, r.column_weights = column_weights, r.new_scales = found;
    r.shares = shares, r.share_count = sizes[4];
    return by_tiles(&r, threads, quantizers()->ranges);
}

/* Summed weights, and weights times values, of what is nearest to each entry: sums [chunks][2][entries].
 *
 * `sizes` holds the number of blocks, their size, the period of the weights and the entries. Chunks are of
 * CK_FIT_CHUNK blocks, whatever the threads, so their sum in order has one result.
 */
CK_EXPORT int ck_entry_sums(const float *values, const float *scales, const float *weights, const float *table,
                            double *sums, const int64_t *sizes, int threads) {
    ck_fitting f = {.values = values,
                    .scales = scales,
                    .weights = weights,
                    .sums = sums,
                    .table = table,
                    .count = sizes[0],
                    .block_size = sizes[1],
                    .period = sizes[2],
                    .entries = sizes[3]};
    ck_parallel(ck_ceil_div(f.count, CK_FIT_CHUNK), 1, threads, quantizers()->sums, &f);
    return 0;
}

/* Largest absolute weight of every block, [O][N]; sizes: O, I, block size. */
CK_EXPORT int ck_block_maxima(const float *weights, float *maxima, const int64_t *sizes, int threads) {
    ck_blocks b = {
        .weights = weights, .maxima = maxima, .rows = sizes[0], .columns = sizes[1], .block_size = sizes[2]};
    ck_parallel(b.rows, 16, threads, quantizers()->maxima, &b);
    return 0;
}

/* Codes packed as the checkpoint packs them; where `values` is given, what they stand for instead. sizes[4]: bits. */
CK_EXPORT int ck_quantize(const float *weights, const float *scales, const float *table, uint8_t *packed,
                          float *values, const int64_t *sizes, int threads) {
    ck_blocks b = {.weights = weights,
                   .scales = scales,
                   .table = table,
                   .packed = packed,
                   .values = values,
                   .rows = sizes[0],
                   .columns = sizes[1],
                   .block_size = sizes[2],
                   .entries = sizes[3],
                   .bits = sizes[4]};
    ck_parallel(b.rows, 16, threads, quantizers()->quantize, &b);
    return b.failed;
}

/* Sums of squared rounding errors and of the errors of every row, [scalings][CK_TABLES][O] each.
 *
 * sizes: O, I, block size, scalings. */
CK_EXPORT int ck_menu_errors(const float *weights, const float *element_weights, const float *scales,
                             const int32_t *uses, const float *tables, const int64_t *entries, double *squares,
                             double *sums, const int64_t *sizes, int threads) {
    ck_menu m = {.weights = weights,
                 .element_weights = element_weights,
                 .scales = scales,
                 .uses = uses,
                 .tables = tables,
                 .entries = entries,
                 .squares = squares,
                 .sums = sums,
                 .rows = sizes[0],
                 .columns = sizes[1],
                 .block_size = sizes[2],
                 .scalings = sizes[3]};
    ck_parallel(ck_ceil_div(m.rows, CK_ROWS), 1, threads, quantizers()->errors, &m);
    return m.failed;
}

/* Importance summed over each row [O] (sizes[4] = 0) or column [I]; sizes: O, I, R, whether squares, whether columns. */
CK_EXPORT int ck_importance_sums(const float *weights, const float *left, const float *right, double *sums,
                                 const int64_t *sizes, int threads) {
    ck_importance m = {.weights = weights,
                       .left = left,
                       .right = right,
                       .sums = sums,
                       .rows = sizes[0],
                       .columns = sizes[1],
                       .rank = sizes[2],
                       .square = sizes[3]};
    if (sizes[4])
        ck_parallel(ck_ceil_div(m.columns, CK_STRIP), 1, threads, quantizers()->importance_by_columns, &m);
    else
        ck_parallel(m.rows, 64, threads, quantizers()->importance_by_rows, &m);
    return m.failed;
}
