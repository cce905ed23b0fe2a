/* Weights of tiles as rows. */
#ifndef CK_KERNELS_DEQUANTIZE_H
#define CK_KERNELS_DEQUANTIZE_H

#include "kernels_decode.h"

/* The next 16 columns of a tile, one vector a column, zeros after the width. */
INLINE void decode_16(const ck_matrix *m, int bits, small_table table, const uint32_t *codes, int64_t column,
                      scale_walk *walk, v16 *scale, v16 columns[16]) {
    int64_t octets = m->block_size / 8, all = m->blocks * octets;
    UNROLL
    for (int half = 0; half < 2; half++) {
        int64_t octet = column / 8 + half;
        v16 values[8];
        UNROLL
        for (int f = 0; f < 8; f++) columns[8 * half + f] = v_zero();
        if (octet >= all) continue;
        if (octet % octets == 0) *scale = next_scales(walk);
        octet_values(m, codes, bits, table, octet, values);
        UNROLL
        for (int f = 0; f < 8; f++) columns[8 * half + f] = v_mul(values[f], *scale);
    }
}

/* Write 64 bytes, or fewer at the end of a row, to each row of a tile from `from` to `to`. */
INLINE void write_rows(char *out, int64_t pitch, const v16 rows[16], int64_t from, int64_t to, int64_t bytes) {
    if (from == 0 && to == CK_TILE && bytes >= 64) {
        UNROLL
        for (int lane = 0; lane < 16; lane++) v_write(out + lane * pitch, CK_F32, 16, rows[lane]);
        return;
    }
    for (int64_t lane = from; lane < to; lane++) {
        float whole[16];
        v_store(whole, rows[lane]);
        memcpy(out + lane * pitch, whole, (size_t)ck_min(bytes, 64));
    }
}

INLINE void dequantize_tile(const ck_matrix *m, int bits, int64_t tile, const ck_part *part, char *out, int type) {
    int64_t size = ck_size(type), pitch = (part->last_column - part->first_column) * size;
    int64_t first_row = part->first_row, last_row = part->last_row;
    scale_walk walk = walk_scales(m, tile);
    small_table table = matrix_table(m, bits);
    v16 scale = v_zero(), rows[16];
    for (int64_t column = 0; column < part->first_column; column += m->block_size) scale = next_scales(&walk);
    const uint32_t *codes = m->codes + tile * ck_tile_words(m);
    int64_t from = first_row > tile * CK_TILE ? first_row - tile * CK_TILE : 0;
    int64_t to = ck_min(CK_TILE, last_row - tile * CK_TILE);
    out += (tile * CK_TILE - first_row) * pitch;
    if (type == CK_F32) {
        for (int64_t column = part->first_column; column < part->last_column; column += 16, out += 16 * size) {
            decode_16(m, bits, table, codes, column, &walk, &scale, rows);
            v_transpose(rows);
            write_rows(out, pitch, rows, from, to, (part->last_column - column) * size);
        }
        return;
    }
    for (int64_t column = part->first_column; column < part->last_column; column += 32, out += 32 * size) {
        /* pairs of columns share a word */
        v16 columns[16];
        UNROLL
        for (int half = 0; half < 2; half++) {
            decode_16(m, bits, table, codes, column + 16 * half, &walk, &scale, columns);
            UNROLL
            for (int i = 0; i < 8; i++) rows[8 * half + i] = v_halves(columns[2 * i], columns[2 * i + 1], type);
        }
        v_transpose(rows);
        write_rows(out, pitch, rows, from, to, (part->last_column - column) * size);
    }
}

static void dequantize(const ck_matrix *m, int64_t begin, int64_t end, const ck_part *part, void *out, int type) {
    for (int64_t tile = begin; tile < end; tile++) BY_BITS(m, dequantize_tile, tile, part, out, type);
}

#endif
