/* The inner kernels of one instruction-set level: decoding of tiles, and products with them. */
#ifndef CK_KERNELS_H
#define CK_KERNELS_H

#include "matrix.h"

/* Low-rank factors of the type of x and y: left [rank, rows], right [rank, columns]. */
typedef struct {
    const void *left, *right;
    int64_t rank;
} ck_factors;

typedef struct {
    const ck_matrix *matrix;
    const void *raw;           /* x [tokens, columns] of `type` */
    void *y;                   /* [tokens, rows] of `type` */
    int64_t type, tokens;
    const float *x;            /* x as `widen` leaves it: [sets of tokens][octets][tokens of the set][8], or [4] words
                                * of two where pairs of bfloat16 are multiplied */
    const ck_factors *factors; /* NULL without */
    const float *inner;        /* [tokens, rank]: x times right transposed */
    float *workspace;          /* of the panel kernel, `threads` times ck_panel_floats */
    int64_t tiles_at_once;     /* of the panel kernel, at most 8 */
    int64_t next_slot;         /* of the workspace */
} ck_product;

static inline int64_t ck_size(int64_t type) { return type == CK_F32 ? 4 : 2; }

/* Rows and columns first to last (not included); first_column is a multiple of CK_CHUNK. */
typedef struct { int64_t first_row, last_row, first_column, last_column; } ck_part;

typedef struct {
    int pairs; /* bfloat16 inputs are held as words of two */
    /* Whether `direct` serves a product; `panel` serves the others. */
    int (*is_direct)(const ck_matrix *m, int64_t tokens, int64_t type);
    /* y of tiles begin to end for few tokens: codes are decoded in registers. */
    void (*direct)(const ck_product *p, int64_t begin, int64_t end);
    /* The same for any number of tokens: a panel of decoded weights in the cache, times blocks of tokens.
     * begin and end count groups of `tiles_at_once` tiles. */
    void (*panel)(const ck_product *p, float *workspace, int64_t begin, int64_t end);
    /* Weights of tiles begin to end that lie in a part, as rows of `type`; `out` is where first_row goes. */
    void (*dequantize)(const ck_matrix *m, int64_t begin, int64_t end, const ck_part *part, void *out, int type);
    /* inner[:, begin to end] of the factors. */
    void (*inner)(const ck_product *p, float *inner, int64_t begin, int64_t end);
    /* Tokens begin to end of x as the two products read them. */
    void (*widen)(const ck_product *p, float *to, int64_t begin, int64_t end);
    /* 192 multiplications and additions a round (twice as many with pairs), for the account of a benchmark. */
    float (*peak)(int64_t rounds, int64_t type);
} ck_kernels;

extern const ck_kernels ck_kernels_scalar, ck_kernels_avx2, ck_kernels_avx512, ck_kernels_avx512_bf16;

#define CK_PANEL_COLUMNS 256

/* Floats of workspace that one thread needs for the panel kernel. */
static inline int64_t ck_panel_floats(int64_t tokens, int64_t tiles_at_once) {
    return (CK_PANEL_COLUMNS + tokens) * tiles_at_once * CK_TILE;
}

#endif
