/* Plain rounding of blocks: their largest weights, codes packed as a checkpoint stores them, and a menu's errors. */
#include <stdlib.h>

#include "lanes.h"
#include "quantize.h"

/* Largest absolute weight of every block of rows begin to end; where one is not finite, neither is that. */
static void maxima_of_rows(void *argument, int64_t begin, int64_t end) {
    const ck_blocks *b = argument;
    int64_t blocks = ck_ceil_div(b->columns, b->block_size);
    for (int64_t row = begin; row < end; row++)
        for (int64_t block = 0; block < blocks; block++) {
            const float *from = b->weights + row * b->columns + block * b->block_size;
            int64_t count = ck_min(b->block_size, b->columns - block * b->block_size), at = 0;
            codes_of_lanes most = no_codes(); /* as integers: there a NaN is above infinity, and that above the rest */
            for (; at + LANES <= count; at += LANES) most = larger_code(most, bits_of(absolute(load(from + at))));
            int32_t each[LANES], best = 0;
            memcpy(each, &most, sizeof each);
            for (int lane = 0; lane < LANES; lane++) best = each[lane] > best ? each[lane] : best;
            for (; at < count; at++) {
                int32_t bits = (int32_t)(ck_to_bits(from[at]) & 0x7fffffff);
                best = bits > best ? bits : best;
            }
            b->maxima[row * blocks + block] = ck_from_bits((uint32_t)best);
        }
}

/* Put the codes of a row into its place in planes of 1, 2, 4 or 8 bits. `count` is a multiple of 8. */
static void pack_row(const uint8_t *codes, int64_t count, int bits, uint8_t *low, uint8_t *high) {
    switch (bits) {
        case 3:
            for (int64_t at = 0; at < count / 8; at++) {
                const uint8_t *c = codes + 8 * at;
                high[at] = (uint8_t)(c[0] >> 2 | c[1] >> 2 << 1 | c[2] >> 2 << 2 | c[3] >> 2 << 3 | c[4] >> 2 << 4 |
                                     c[5] >> 2 << 5 | c[6] >> 2 << 6 | c[7] >> 2 << 7);
            } /* fall through */
        case 2:
            for (int64_t at = 0; at < count / 4; at++) {
                const uint8_t *c = codes + 4 * at;
                low[at] = (uint8_t)((c[0] & 3) | (c[1] & 3) << 2 | (c[2] & 3) << 4 | (c[3] & 3) << 6);
            }
            break;
        case 4:
            for (int64_t at = 0; at < count / 2; at++) low[at] = (uint8_t)(codes[2 * at] | codes[2 * at + 1] << 4);
            break;
        default: memcpy(low, codes, (size_t)count);
    }
}

/* Codes, packed, or the values they stand for, of rows begin to end. */
static void quantize_rows(void *argument, int64_t begin, int64_t end) {
    ck_blocks *b = argument;
    int64_t size = b->block_size, blocks = ck_ceil_div(b->columns, size), width = blocks * size;
    lookup table;
    make_lookup(&table, b->table, b->entries);
    lanes first = load(table.entries);
    uint8_t *codes = malloc((size_t)(width + LANES));
    if (!codes) b->failed = 1;
    for (int64_t row = begin; !b->failed && row < end; row++) {
        const float *from = b->weights + row * b->columns;
        for (int64_t block = 0; block < blocks; block++) {
            float scale = b->scales[row * blocks + block];
            lanes divisor = every(scale > 0 ? scale : INFINITY);
            for (int64_t start = block * size; start < (block + 1) * size; start += LANES) {
                float part[LANES] = {0}; /* what lies after the block is rounded, and overwritten or not read */
                int64_t count = ck_min(LANES, b->columns - start);
                lanes values = count == LANES ? load(from + start) : every(0);
                if (count > 0 && count < LANES) {
                    memcpy(part, from + start, (size_t)count * sizeof *part);
                    values = load(part);
                }
                codes_of_lanes found = nearest(&table, values / divisor);
                if (!b->values) {
                    store_codes(codes + start, found);
                    continue;
                }
                lanes stand_for = entries_of(&table, first, found) * every(scale);
                count = ck_min(count, (block + 1) * size - start);
                float *to = b->values + row * b->columns + start;
                if (count == LANES) {
                    store(to, stand_for);
                } else if (count > 0) {
                    store(part, stand_for);
                    memcpy(to, part, (size_t)count * sizeof *part);
                }
            }
        }
        if (b->values) continue;
        int64_t low = b->bits == 3 ? 2 : b->bits;
        uint8_t *high = b->packed + b->rows * width / 4;
        pack_row(codes, width, (int)b->bits, b->packed + row * width * low / 8, high + row * width / 8);
    }
    free(codes);
}

/* Add the errors of a block of CK_ROWS rows side by side, [count][CK_ROWS], and their squares, to sums for each row.
 *
 * Weights count for the squares alone. */
static void add_errors(const lookup *table, const float *values, const float *weights, int64_t count,
                       const float *scales, double *squares, double *sums) {
    lanes first = load(table->entries), most = every(3.4028234663852886e38f);
    for (int v = 0; v < CK_ROWS; v += LANES) {
        lanes scale = load(scales + v), total = every(0), plain = every(0), inverse = every(1) / scale;
        /* A tiny scale has no finite reciprocal, and zero times infinity is no unit. */
        inverse = where_above(scale, every(0), where_above(inverse, most, most, inverse), every(0));
        for (int64_t at = 0; at < count; at++) {
            lanes value = load(values + at * CK_ROWS + v);
            lanes error = entries_of(table, first, nearest(table, value * inverse)) * scale - value;
            lanes square = error * error;
            if (weights) square = square * load(weights + at * CK_ROWS + v);
            total = total + square;
            plain = plain + error;
        }
        float each[LANES];
        store(each, total);
        for (int lane = 0; lane < LANES; lane++) squares[v + lane] += each[lane];
        store(each, plain);
        for (int lane = 0; lane < LANES; lane++) sums[v + lane] += each[lane];
    }
}

/* Some columns of CK_ROWS rows side by side, [count][CK_ROWS]; rows after the last are zero. */
static void read_block(const float *from, int64_t width, int rows, int64_t count, float *to) {
    for (int row = 0; row < CK_ROWS; row++)
        for (int64_t at = 0; at < count; at++) to[at * CK_ROWS + row] = row < rows ? from[row * width + at] : 0;
}

/* Errors and squared errors of every row of tiles begin to end, for every scaling and table asked for. */
static void errors_of_tiles(void *argument, int64_t begin, int64_t end) {
    ck_menu *m = argument;
    int64_t size = m->block_size, blocks = ck_ceil_div(m->columns, size), of_tile = m->scalings * CK_TABLES;
    lookup *tables = malloc(CK_TABLES * sizeof *tables);
    float *room = malloc((size_t)(2 * size * CK_ROWS) * sizeof *room), scales[CK_ROWS];
    double *squares = malloc((size_t)(2 * of_tile * CK_ROWS) * sizeof *squares), *sums = squares + of_tile * CK_ROWS;
    if (!tables || !room || !squares) m->failed = 1;
    for (int table = 0; !m->failed && table < CK_TABLES; table++)
        if (m->entries[table]) make_lookup(tables + table, m->tables + 256 * table, m->entries[table]);
    for (int64_t tile = begin; !m->failed && tile < end; tile++) {
        int64_t start = tile * CK_ROWS;
        int rows = (int)ck_min(CK_ROWS, m->rows - start);
        for (int64_t at = 0; at < 2 * of_tile * CK_ROWS; at++) squares[at] = 0;
        for (int64_t block = 0; block < blocks; block++) {
            int64_t column = block * size, count = ck_min(size, m->columns - column);
            float *weights = m->element_weights ? room + size * CK_ROWS : NULL;
            read_block(m->weights + start * m->columns + column, m->columns, rows, count, room);
            if (weights) read_block(m->element_weights + start * m->columns + column, m->columns, rows, count, weights);
            for (int64_t at = 0; at < m->scalings; at++) {
                read_block(m->scales + (at * m->rows + start) * blocks + block, blocks, rows, 1, scales);
                for (int table = 0; table < CK_TABLES; table++) {
                    int64_t place = (at * CK_TABLES + table) * CK_ROWS;
                    if (m->uses[at] >> table & 1)
                        add_errors(tables + table, room, weights, count, scales, squares + place, sums + place);
                }
            }
        }
        for (int64_t at = 0; at < of_tile; at++)
            for (int row = 0; row < rows; row++) {
                m->squares[at * m->rows + start + row] = squares[at * CK_ROWS + row];
                m->sums[at * m->rows + start + row] = sums[at * CK_ROWS + row];
            }
    }
    free(tables), free(room), free(squares);
}
