/* Rounding of tiles of rows: with error feedback, by coordinate descent on codes, and the search for ranges and scales.
 *
 * In a tile the rows lie side by side in the lanes, one column after the other: [I][CK_ROWS]. What feedback and descent
 * spend their time on is sums of columns times coefficients; `add_products` keeps several of them in registers.
 */
#include <stdlib.h>

#include "lanes.h"
#include "quantize.h"

#define VECTORS (CK_ROWS / LANES)
#define SIDE 2                          /* vectors of rows, and */
#define TARGETS (LANES == 16 ? 12 : 4) /* columns, that registers hold the sums of */

static float *room(int64_t floats) {
    return aligned_alloc(64, (size_t)ck_ceil_div(floats * 4, 64) * 64);
}

/* to[c] += sum over t of a[c][t * stride] * x[t], t ascending, for `count` columns of a tile. */
static inline __attribute__((always_inline)) void add_products_of(
    const int count, float *const *to, const float *const *a, int64_t stride, int64_t terms, const float *x) {
    for (int first = 0; first < CK_ROWS; first += SIDE * LANES) {
        lanes sums[TARGETS][SIDE];
        EACH_OF_16 for (int c = 0; c < count; c++)
            EACH_OF_16 for (int v = 0; v < SIDE; v++) sums[c][v] = load(to[c] + first + v * LANES);
        for (int64_t t = 0; t < terms; t++) {
            lanes values[SIDE];
            EACH_OF_16 for (int v = 0; v < SIDE; v++) values[v] = load(x + t * CK_ROWS + first + v * LANES);
            EACH_OF_16 for (int c = 0; c < count; c++) {
                lanes factor = every(a[c][t * stride]);
                EACH_OF_16 for (int v = 0; v < SIDE; v++) sums[c][v] = multiply_add(factor, values[v], sums[c][v]);
            }
        }
        EACH_OF_16 for (int c = 0; c < count; c++)
            EACH_OF_16 for (int v = 0; v < SIDE; v++) store(to[c] + first + v * LANES, sums[c][v]);
    }
}

static void add_products(
    int64_t count, float *const *to, const float *const *a, int64_t stride, int64_t terms, const float *x) {
    int64_t c = 0;
    for (; c + TARGETS <= count; c += TARGETS) add_products_of(TARGETS, to + c, a + c, stride, terms, x);
    for (; c + 4 <= count; c += 4) add_products_of(4, to + c, a + c, stride, terms, x);
    for (; c < count; c++) add_products_of(1, to + c, a + c, stride, terms, x);
}

/* Lanes of a tile that are rows of the matrix. */
static int rows_of(const ck_rounding *r, int64_t tile) { return (int)ck_min(CK_ROWS, r->rows - tile * CK_ROWS); }

static int64_t blocks_of(const ck_rounding *r) { return ck_ceil_div(r->columns, r->block_size); }

/* Some columns of a row-major matrix [O][width] as a tile; lanes after the last row are zero. */
static void read_tile(
    const ck_rounding *r, int64_t tile, const float *from, int64_t width, const int64_t *order, float *to) {
    int here = rows_of(r, tile);
    if (here < CK_ROWS) memset(to, 0, (size_t)(width * CK_ROWS) * sizeof *to);
    for (int lane = 0; lane < here; lane++) {
        const float *row = from + (tile * CK_ROWS + lane) * width;
        for (int64_t at = 0; at < width; at++) to[at * CK_ROWS + lane] = row[order ? order[at] : at];
    }
}

static void write_tile(const ck_rounding *r, int64_t tile, const float *from, int64_t width, float *to) {
    for (int lane = 0; lane < rows_of(r, tile); lane++) {
        float *row = to + (tile * CK_ROWS + lane) * width;
        for (int64_t at = 0; at < width; at++) row[at] = from[at * CK_ROWS + lane];
    }
}

static void read_codes(const ck_rounding *r, int64_t tile, uint8_t *to) {
    int here = rows_of(r, tile);
    if (here < CK_ROWS) memset(to, 0, (size_t)(r->columns * CK_ROWS));
    for (int lane = 0; lane < here; lane++) {
        const uint8_t *row = r->codes + (tile * CK_ROWS + lane) * r->columns;
        for (int64_t at = 0; at < r->columns; at++) to[at * CK_ROWS + lane] = row[at];
    }
}

static void write_codes(const ck_rounding *r, int64_t tile, const uint8_t *from, const int64_t *order) {
    for (int lane = 0; lane < rows_of(r, tile); lane++) {
        uint8_t *row = r->codes + (tile * CK_ROWS + lane) * r->columns;
        for (int64_t at = 0; at < r->columns; at++) row[order ? order[at] : at] = from[at * CK_ROWS + lane];
    }
}

/* What a scale divides by: itself, or infinity for 0, so that such a block's units are 0. */
static inline lanes divisor_of(lanes scale) { return where_above(scale, every(0), scale, every(INFINITY)); }

/* Tiles begin to end with error feedback. Codes and errors come out. */
static void feedback_tiles(void *argument, int64_t begin, int64_t end) {
    ck_rounding *r = argument;
    int64_t width = r->columns, blocks = blocks_of(r);
    lookup table;
    make_lookup(&table, r->table, r->entries);
    lanes first = load(table.entries);
    float *work = room(width * CK_ROWS), *scales = room(blocks * CK_ROWS), *lost = room(CK_PANEL * CK_ROWS);
    uint8_t *codes = malloc((size_t)(width * CK_ROWS));
    const float **a = malloc((size_t)width * sizeof *a);
    float **to = malloc((size_t)width * sizeof *to);
    if (!work || !scales || !lost || !codes || !a || !to) r->failed = 1;
    for (int64_t tile = begin; !r->failed && tile < end; tile++) {
        double errors[CK_ROWS] = {0};
        read_tile(r, tile, r->weights, width, r->order, work);
        read_tile(r, tile, r->scales, blocks, NULL, scales);
        for (int64_t start = 0; start < width; start += CK_PANEL) {
            int64_t stop = ck_min(width, start + CK_PANEL);
            for (int64_t at = start; at < stop; at++) {
                float *column = work + at * CK_ROWS, *gone = lost + (at - start) * CK_ROWS;
                const float *factors = r->coefficients + start * width + at;
                const float *scale = scales + r->order[at] / r->block_size * CK_ROWS;
                add_products_of(1, &column, &factors, width, at - start, lost);
                for (int v = 0; v < VECTORS; v++) {
                    lanes own = load(scale + v * LANES), value = load(column + v * LANES);
                    codes_of_lanes found = nearest(&table, value / divisor_of(own));
                    store_codes(codes + at * CK_ROWS + v * LANES, found);
                    /* The negative error: what is added to the columns after this one. */
                    store(gone + v * LANES, entries_of(&table, first, found) * own - value);
                }
                for (int lane = 0; lane < CK_ROWS; lane++)
                    errors[lane] += (double)r->diagonal[r->order[at]] * ((double)gone[lane] * gone[lane]);
            }
            for (int64_t at = stop; at < width; at++) {
                a[at - stop] = r->coefficients + start * width + at;
                to[at - stop] = work + at * CK_ROWS;
            }
            add_products(width - stop, to, a, width, stop - start, lost);
        }
        write_codes(r, tile, codes, r->order);
        for (int lane = 0; lane < rows_of(r, tile); lane++) r->errors[tile * CK_ROWS + lane] = errors[lane];
    }
    free(work), free(scales), free(lost), free(codes), free(a), free(to);
}

/* What the codes of a tile leave of the weights, [I][CK_ROWS]. */
static void rest_of_tile(
    const ck_rounding *r, int64_t tile, const lookup *table, const uint8_t *codes, const float *scales, float *rest) {
    lanes first = load(table->entries);
    read_tile(r, tile, r->weights, r->columns, NULL, rest);
    for (int64_t at = 0; at < r->columns; at++)
        for (int v = 0; v < VECTORS; v++) {
            float *here = rest + at * CK_ROWS + v * LANES;
            lanes scale = load(scales + at / r->block_size * CK_ROWS + v * LANES);
            lanes unit = entries_of(table, first, load_codes(codes + at * CK_ROWS + v * LANES));
            store(here, load(here) - unit * scale);
        }
}

/* Coordinate descent on the codes of tiles begin to end. */
static void codes_of_tiles(void *argument, int64_t begin, int64_t end) {
    ck_rounding *r = argument;
    int64_t width = r->columns, blocks = blocks_of(r);
    lookup table;
    make_lookup(&table, r->table, r->entries);
    lanes first = load(table.entries);
    float *rest = room(width * CK_ROWS), *scales = room(blocks * CK_ROWS);
    float *slopes = room(CK_PANEL * CK_ROWS), *moved = room(CK_PANEL * CK_ROWS), corner[CK_PANEL];
    uint8_t *codes = malloc((size_t)(width * CK_ROWS));
    if (!rest || !scales || !slopes || !moved || !codes) r->failed = 1;
    for (int64_t tile = begin; !r->failed && tile < end; tile++) {
        read_tile(r, tile, r->scales, blocks, NULL, scales);
        read_codes(r, tile, codes);
        rest_of_tile(r, tile, &table, codes, scales, rest);
        for (int64_t step = 0; step < r->passes * ck_ceil_div(width, CK_PANEL); step++) {
            int64_t start = step % ck_ceil_div(width, CK_PANEL) * CK_PANEL;
            int64_t count = ck_min(width - start, CK_PANEL);
            const float *a[CK_PANEL];
            float *to[CK_PANEL];
            for (int64_t at = 0; at < count; at++) {
                a[at] = r->coefficients + r->order[start + at] * width;
                to[at] = slopes + at * CK_ROWS;
            }
            memset(slopes, 0, CK_PANEL * CK_ROWS * sizeof *slopes);
            add_products(count, to, a, 1, width, rest); /* minus half the error's gradient */
            for (int64_t at = 0; at < count; at++) {
                int64_t column = r->order[start + at];
                const float *scale = scales + column / r->block_size * CK_ROWS, *factors = corner;
                float *slope = slopes + at * CK_ROWS, *gone = moved + at * CK_ROWS;
                for (int64_t before = 0; before < at; before++) corner[before] = a[at][r->order[start + before]];
                add_products_of(1, &slope, &factors, 1, at, moved);
                for (int v = 0; v < VECTORS; v++) {
                    uint8_t *code = codes + column * CK_ROWS + v * LANES;
                    float *left = rest + column * CK_ROWS + v * LANES;
                    lanes own = load(scale + v * LANES);
                    lanes value = entries_of(&table, first, load_codes(code)) * own;
                    lanes wanted = value + load(slope + v * LANES) / every(r->diagonal[column]);
                    codes_of_lanes found = nearest(&table, wanted / divisor_of(own));
                    lanes back = value - entries_of(&table, first, found) * own;
                    store_codes(code, found);
                    store(gone + v * LANES, back);
                    store(left, load(left) + back);
                }
            }
        }
        write_codes(r, tile, codes, NULL);
    }
    free(rest), free(scales), free(slopes), free(moved), free(codes);
}

/* Better scales for the codes of tiles begin to end, one block after the other. */
static void scales_of_tiles(void *argument, int64_t begin, int64_t end) {
    ck_rounding *r = argument;
    int64_t width = r->columns, blocks = blocks_of(r), size = r->block_size;
    lookup table;
    make_lookup(&table, r->table, r->entries);
    lanes first = load(table.entries);
    float *rest = room(width * CK_ROWS), *scales = room(blocks * CK_ROWS);
    float *units = room(size * CK_ROWS), *slopes = room(2 * size * CK_ROWS), *bends = slopes + size * CK_ROWS;
    uint8_t *codes = malloc((size_t)(width * CK_ROWS));
    const float **a = malloc((size_t)size * sizeof *a);
    float **to = malloc((size_t)size * sizeof *to);
    if (!rest || !scales || !units || !slopes || !codes || !a || !to) r->failed = 1;
    for (int64_t tile = begin; !r->failed && tile < end; tile++) {
        read_tile(r, tile, r->scales, blocks, NULL, scales);
        read_codes(r, tile, codes);
        rest_of_tile(r, tile, &table, codes, scales, rest);
        for (int64_t block = 0; block < blocks; block++) {
            int64_t start = block * size, count = ck_min(size, width - start);
            memset(slopes, 0, (size_t)(2 * size * CK_ROWS) * sizeof *slopes);
            for (int64_t at = 0; at < count; at++) {
                for (int v = 0; v < VECTORS; v++) {
                    codes_of_lanes held = load_codes(codes + (start + at) * CK_ROWS + v * LANES);
                    store(units + at * CK_ROWS + v * LANES, entries_of(&table, first, held));
                }
                a[at] = r->coefficients + (start + at) * width;
                to[at] = slopes + at * CK_ROWS;
            }
            add_products(count, to, a, 1, width, rest);
            for (int64_t at = 0; at < count; at++) a[at] += start, to[at] = bends + at * CK_ROWS;
            add_products(count, to, a, 1, count, units);
            for (int v = 0; v < VECTORS; v++) {
                lanes curve = every(0), pull = every(0), scale = load(scales + block * CK_ROWS + v * LANES);
                for (int64_t at = 0; at < count; at++) {
                    lanes unit = load(units + at * CK_ROWS + v * LANES);
                    curve = multiply_add(unit, load(bends + at * CK_ROWS + v * LANES), curve);
                    pull = multiply_add(unit, load(slopes + at * CK_ROWS + v * LANES), pull);
                }
                lanes step = where_above(curve, every(0), pull / curve, every(0));
                step = larger(step, every(0) - scale);
                store(scales + block * CK_ROWS + v * LANES, scale + step);
                for (int64_t at = 0; at < count; at++) {
                    float *here = rest + (start + at) * CK_ROWS + v * LANES;
                    store(here, load(here) - load(units + at * CK_ROWS + v * LANES) * step);
                }
            }
        }
        write_tile(r, tile, scales, blocks, r->new_scales);
    }
    free(rest), free(scales), free(units), free(slopes), free(codes), free(a), free(to);
}

/* The best range of every block of tiles begin to end, of those tried. */
static void ranges_of_tiles(void *argument, int64_t begin, int64_t end) {
    ck_rounding *r = argument;
    int64_t width = r->columns, blocks = blocks_of(r);
    lookup table;
    make_lookup(&table, r->table, r->entries);
    lanes first = load(table.entries);
    float *work = room(width * CK_ROWS), *chosen = room(blocks * CK_ROWS);
    if (!work || !chosen) r->failed = 1;
    for (int64_t tile = begin; !r->failed && tile < end; tile++) {
        read_tile(r, tile, r->weights, width, NULL, work);
        for (int64_t block = 0; block < blocks; block++) {
            int64_t start = block * r->block_size, stop = ck_min(width, start + r->block_size);
            for (int v = 0; v < VECTORS; v++) {
                const float *column = work + v * LANES;
                lanes most = every(0), best = every(INFINITY);
                for (int64_t at = start; at < stop; at++) most = larger(most, absolute(load(column + at * CK_ROWS)));
                lanes kept = most;
                for (int64_t s = 0; s < r->share_count; s++) {
                    lanes scale = every(r->shares[s]) * most, divisor = divisor_of(scale), total = every(0);
                    for (int64_t at = start; at < stop; at++) {
                        lanes value = load(column + at * CK_ROWS);
                        lanes unit = entries_of(&table, first, nearest(&table, value / divisor));
                        lanes error = unit * scale - value;
                        total = multiply_add(error * error, every(r->column_weights[at]), total);
                    }
                    kept = where_above(best, total, scale, kept);
                    best = where_above(best, total, total, best);
                }
                store(chosen + block * CK_ROWS + v * LANES, kept);
            }
        }
        write_tile(r, tile, chosen, blocks, r->new_scales);
    }
    free(work), free(chosen);
}

#define STREAMS 4 /* sums of neighbours are kept apart, so that none waits for the one before it */

/* Mass and moment of what is nearest to each entry, blocks in units of their scales, by chunks begin to end. */
static void sums_of_chunks(void *argument, int64_t begin, int64_t end) {
    const ck_fitting *f = argument;
    int64_t size = f->block_size;
    lookup table;
    make_lookup(&table, f->table, f->entries);
    for (int64_t chunk = begin; chunk < end; chunk++) {
        double mass[STREAMS][256] = {{0}}, moment[STREAMS][256] = {{0}};
        double *sums = f->sums + chunk * 2 * f->entries;
        int64_t stop = ck_min(f->count, (chunk + 1) * CK_FIT_CHUNK);
        for (int64_t block = chunk * CK_FIT_CHUNK; block < stop; block++) {
            const float *values = f->values + block * size, *weights = f->weights + block % f->period * size;
            float scale = f->scales[block], square = scale * scale, units[LANES] = {0};
            uint8_t codes[LANES];
            if (!(scale > 0)) continue;
            for (int64_t start = 0; start < size; start += LANES) {
                int64_t count = ck_min(LANES, size - start);
                memcpy(units, values + start, (size_t)count * sizeof *units);
                store(units, load(units) / every(scale)); /* what lies after the block is not read */
                store_codes(codes, nearest(&table, load(units)));
                for (int64_t at = 0; at < count; at++) {
                    double weight = weights[start + at] * square;
                    mass[at % STREAMS][codes[at]] += weight;
                    moment[at % STREAMS][codes[at]] += weight * units[at];
                }
            }
        }
        for (int64_t entry = 0; entry < f->entries; entry++) {
            sums[entry] = mass[0][entry] + mass[1][entry] + (mass[2][entry] + mass[3][entry]);
            sums[f->entries + entry] =
                moment[0][entry] + moment[1][entry] + (moment[2][entry] + moment[3][entry]);
        }
    }
}
