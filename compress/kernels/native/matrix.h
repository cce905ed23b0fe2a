/* The packed layout, version 1: what docs/kernels.md draws.
 *
 * A matrix [rows, width] of codes, width = blocks in a row times block size, is cut into tiles of 16 rows and chunks
 * of 32 columns. A chunk is `bits` vectors of 16 words of 32 bits, word l for row l of the tile. Column 8 q + f of a
 * chunk (q < 4, f < 8) lies in nibble f:
 *
 *   4 bits: vector q, the whole nibble
 *   2 bits: vector q / 2, bits 2 (q % 2) and the next of the nibble
 *   3 bits: the two low bits as with 2 bits, then one vector with the high bit as bit q of the nibble
 *   8 bits: vector 2 q + f / 4, byte f % 4 (no nibbles)
 *
 * so one load yields the codes of 16 rows, and a shift brings the next column into the low nibble, which is all that
 * a table look-up by vpermps reads. Scale codes lie as [tile][block] groups of 16, each packed as the checkpoint
 * packs 16 codes. Rows after the last and columns after the width have code 0 and scale code 0.
 */
#ifndef CK_MATRIX_H
#define CK_MATRIX_H

#include "common.h"

#define CK_TILE 16  /* rows of a tile */
#define CK_CHUNK 32 /* columns of a chunk */

typedef struct {
    const uint32_t *codes;       /* [tiles][chunks][bits][16] */
    const uint8_t *scale_codes;  /* [tiles][blocks][2 * scale_bits] */
    const float *steps;          /* [groups]: second-level scale over 2 ** scale_bits - 1 */
    const float *table;          /* [2 ** bits] */
    const float *offset;         /* [1]; scale = code * step + offset, each operation rounded to float32 */
    int64_t rows, columns;       /* of the matrix, without padding */
    int64_t blocks;              /* in a row */
    int64_t block_size;          /* a multiple of 8 */
    int64_t group_size;          /* blocks, in row-major order, that share a step */
    int64_t groups;              /* steps there are */
    int64_t bits, scale_bits;    /* 2, 3, 4 or 8 */
} ck_matrix;

static inline int64_t ck_tiles(const ck_matrix *m) { return ck_ceil_div(m->rows, CK_TILE); }

static inline int64_t ck_chunks(const ck_matrix *m) {
    return ck_ceil_div(m->blocks * m->block_size, CK_CHUNK);
}

/* Words of a tile. */
static inline int64_t ck_tile_words(const ck_matrix *m) { return ck_chunks(m) * m->bits * CK_TILE; }

/* Scale codes of a block of a tile, [2 * scale_bits] bytes. */
static inline const uint8_t *ck_block_scales(const ck_matrix *m, int64_t tile, int64_t block) {
    return m->scale_codes + (tile * m->blocks + block) * 2 * m->scale_bits;
}

/* Code `at` of those packed as the checkpoint packs `count` codes: planes, lowest bits first. */
static inline unsigned ck_plain_code(const uint8_t *packed, int bits, int64_t count, int64_t at) {
    switch (bits) {
        case 2: return packed[at / 4] >> (2 * (at % 4)) & 3;
        case 3: {
            const uint8_t *high = packed + ck_ceil_div(count, 4);
            return (packed[at / 4] >> (2 * (at % 4)) & 3) | (high[at / 8] >> (at % 8) & 1) << 2;
        }
        case 4: return packed[at / 2] >> (4 * (at % 2)) & 15;
        default: return packed[at];
    }
}

#endif
