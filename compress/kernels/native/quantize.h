/* What rounding needs of a matrix and of its inputs; the arguments of the operations in quantize.c.
 *
 * Names: O outputs (rows), I inputs (columns), N blocks in a row. Matrices are row-major. Every row is rounded by
 * itself, so threads take ranges of tiles of CK_ROWS rows, and no result depends on how many threads there are.
 */
#ifndef CK_QUANTIZE_H
#define CK_QUANTIZE_H

#include "common.h"

#define CK_ROWS 64  /* rows of a tile: the lanes of a few vectors */
#define CK_PANEL 64 /* columns whose effect on the columns after them is applied at once */

typedef struct {
    const float *weights;      /* [O][I] */
    const float *scales;       /* [O][N] */
    float *new_scales;         /* [O][N] */
    uint8_t *codes;            /* [O][I] */
    double *errors;            /* [O] */
    const float *table;        /* [entries], ascending */
    const float *coefficients; /* [I][I]: of feedback the factor's rows over their diagonal, of descent H */
    const float *diagonal;     /* [I]: of feedback what a squared error of a column costs, of descent H's own */
    const int64_t *order;      /* [I]: columns in the order they are rounded in */
    const float *column_weights; /* [I] */
    const float *shares;       /* [share_count] */
    int64_t rows, columns, block_size, entries, passes, share_count;
    int failed; /* set where memory ran out */
} ck_rounding;

typedef struct {
    const float *values;  /* [count][block_size] */
    const float *scales;  /* [count]; blocks of scale 0 are left out */
    const float *weights; /* [period][block_size]: of block n those of n modulo the period */
    double *sums;         /* [chunks][2][entries] */
    const float *table;
    int64_t count, block_size, period, entries;
} ck_fitting;

#define CK_FIT_CHUNK 256 /* blocks whose sums are taken apart from the others', whatever the threads */

typedef struct {
    const float *weights; /* [O][I] */
    const float *scales;  /* [O][N] */
    const float *table;
    float *maxima;   /* [O][N] */
    uint8_t *packed; /* codes of rows padded to whole blocks, in planes */
    float *values;   /* [O][I]; given, it is filled in place of `packed` */
    int64_t rows, columns, block_size, entries, bits;
    int failed;
} ck_blocks;

#define CK_TABLES 4 /* of a menu: one a width */

typedef struct {
    const float *weights;         /* [O][I] */
    const float *element_weights; /* [O][I], of the squared errors, or NULL */
    const float *scales;          /* [scalings][O][N] */
    const int32_t *uses;          /* [scalings]: bit t for table t */
    const float *tables;          /* [CK_TABLES][256] */
    const int64_t *entries;       /* [CK_TABLES], 0 for none */
    double *squares, *sums;       /* [scalings][CK_TABLES][O]; 0 where they are not asked for */
    int64_t rows, columns, block_size, scalings;
    int failed;
} ck_menu;

typedef struct {
    const float *weights; /* [O][I] */
    const float *left;    /* [O][3 R]: gradient of B, B, scaled B */
    const float *right;   /* [3 R][I]: A, less its gradient unless in first order; gradient of A; A */
    double *sums;         /* [O], or [I] */
    int64_t rows, columns, rank, square;
    int failed;
} ck_importance;

#define CK_STRIP 256 /* columns that a thread takes at once where sums are over columns */

/* Tasks of one instruction-set level. */
typedef struct {
    ck_task feedback, codes, scales, ranges, sums, maxima, quantize, errors, importance_by_rows, importance_by_columns;
} ck_quantizers;

/* What the files of every level call their tasks. */
#define CK_QUANTIZERS                                                                                 \
    {                                                                                                 \
        feedback_tiles, codes_of_tiles, scales_of_tiles, ranges_of_tiles, sums_of_chunks, maxima_of_rows, \
            quantize_rows, errors_of_tiles, importance_by_rows, importance_by_columns                 \
    }

extern const ck_quantizers ck_quantize_scalar;
#if CK_X86
extern const ck_quantizers ck_quantize_avx2, ck_quantize_avx512;
#endif

#endif
