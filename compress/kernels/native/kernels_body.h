/* The kernels over vectors of 16 rows, written once; kernels_LEVEL.c includes this after vector_LEVEL.h.
 *
 * Names: an octet is 8 columns, the unit that one vector of nibbles holds; octets never cross a block of scales.
 */
#include "kernels.h"

/* SPECIALIZED: every width of codes and number of tokens is a copy of its own, with all sums in registers. */
#if SPECIALIZED
#define INLINE static inline __attribute__((always_inline))
#define BY_BITS(m, function, ...) \
    switch ((m)->bits) { \
        case 2: function(m, 2, __VA_ARGS__); break; \
        case 3: function(m, 3, __VA_ARGS__); break; \
        case 4: function(m, 4, __VA_ARGS__); break; \
        default: function(m, 8, __VA_ARGS__); \
    }
#else
#define INLINE static
#define BY_BITS(m, function, ...) function(m, (int)(m)->bits, __VA_ARGS__)
#endif

/* Scales of a tile, block after block. */
typedef struct {
    const ck_matrix *m;
    const uint8_t *codes;
    places at;
    v16 steps, offset;
} scale_walk;

INLINE scale_walk walk_scales(const ck_matrix *m, int64_t tile) {
    int32_t rest[CK_TILE], group[CK_TILE];
    int64_t size = m->group_size, first = tile * CK_TILE * m->blocks;
    int64_t full = m->blocks / size, more = m->blocks % size;
    int64_t g = first / size, r = first % size;
    for (int lane = 0; lane < CK_TILE; lane++) {
        rest[lane] = (int32_t)r;
        group[lane] = (int32_t)g;
        g += full;
        r += more;
        if (r >= size) r -= size, g++;
    }
    scale_walk walk = {.m = m, .codes = ck_block_scales(m, tile, 0), .at = places_load(rest, group)};
    walk.steps = places_steps(&walk.at, m->steps, (int32_t)m->groups);
    walk.offset = v_set(m->offset[0]);
    return walk;
}

/* The scales of the present block; then on to the next. Two roundings, as the reference has them. */
INLINE v16 next_scales(scale_walk *walk) {
    const ck_matrix *m = walk->m;
    v16 scale = v_add(v_mul(scale_codes(walk->codes, (int)m->scale_bits), walk->steps), walk->offset);
    walk->codes += 2 * m->scale_bits;
    if (places_step(&walk->at, (int32_t)m->group_size))
        walk->steps = places_steps(&walk->at, m->steps, (int32_t)m->groups);
    return scale;
}

/* Nibbles of octet q of a chunk. */
INLINE w16 octet_nibbles(const uint32_t *chunk, int bits, int q) {
    if (bits == 4) return w_load(chunk + q * CK_TILE);
    w16 low = w_right(w_load(chunk + q / 2 * CK_TILE), 2 * (q % 2));
    if (bits == 2) return low;
    w16 high = w_load(chunk + 2 * CK_TILE);
    return w_select(0x44444444, low, q < 2 ? w_left(high, 2 - q) : w_right(high, q - 2));
}

/* Table entries of an octet, one vector a column. */
INLINE void octet_values(const ck_matrix *m, const uint32_t *tile, int bits, small_table table, int64_t octet,
                         v16 values[8]) {
    if (bits == 8) {
        const uint32_t *words = tile + octet * 2 * CK_TILE;
        UNROLL
        for (int f = 0; f < 8; f++)
            values[f] = look_up_bytes(m->table, w_right(w_load(words + f / 4 * CK_TILE), 8 * (f % 4)));
        return;
    }
    w16 nibbles = octet_nibbles(tile + octet / 4 * bits * CK_TILE, bits, (int)(octet % 4));
    UNROLL
    for (int f = 0; f < 8; f++) {
        w16 index = w_right(nibbles, 4 * f);
        values[f] = bits == 4 ? look_up(table, index) : look_up_8(table, index);
    }
}

INLINE small_table matrix_table(const ck_matrix *m, int bits) {
    return table_load(m->table, bits == 8 ? 2 : bits); /* with 8 bits it is not read */
}

/* Rows of a tile that exist. */
INLINE int lanes_of(const ck_matrix *m, int64_t tile) { return (int)ck_min(CK_TILE, m->rows - tile * CK_TILE); }

/* Add the low-rank part to a token's sums, and write them. */
static __attribute__((noinline)) void finish(const ck_product *p, int64_t tile, int64_t token, v16 sum) {
    const ck_factors *f = p->factors;
    int lanes = lanes_of(p->matrix, tile);
    int64_t row = tile * CK_TILE, rows = p->matrix->rows, size = ck_size(p->type);
    if (f) {
        const char *left = (const char *)f->left + row * size;
        const float *inner = p->inner + token * f->rank;
        for (int64_t r = 0; r < f->rank; r++)
            sum = v_fma(v_read(left + r * rows * size, (int)p->type, lanes), v_set(inner[r]), sum);
    }
    v_write((char *)p->y + (token * rows + row) * size, (int)p->type, lanes, sum);
}

#define PREFETCHED 1024 /* words: a single token is done with a cache line sooner than memory brings the next */

/* Add an octet's products to the sums of its block: octet q of a chunk, `octet` in the row. */
INLINE void direct_octet(const ck_product *p, int bits, small_table table, const uint32_t *chunk, int64_t octet, int q,
                         int tokens, int chains, v16 part[][4]) {
    const float *x = p->x + octet * tokens * 8;
    w16 nibbles = {0};
    __builtin_prefetch(chunk + q * bits * (CK_TILE / 4) + PREFETCHED);
    if (bits < 8) nibbles = octet_nibbles(chunk, bits, q);
    UNROLL
    for (int f = 0; f < 8; f++) {
        v16 w;
        if (bits == 8)
            w = look_up_bytes(p->matrix->table, w_right(w_load(chunk + (2 * q + f / 4) * CK_TILE), 8 * (f % 4)));
        else if (bits == 4)
            w = look_up(table, w_right(nibbles, 4 * f));
        else
            w = look_up_8(table, w_right(nibbles, 4 * f));
        UNROLL
        for (int t = 0; t < tokens; t++)
            part[t][f % chains] = v_fma(w, v_set(x[t * 8 + f]), part[t][f % chains]);
    }
}

INLINE void direct_tiles(const ck_matrix *m, int bits, const ck_product *p, int64_t begin, int64_t end, int tokens) {
    small_table table = matrix_table(m, bits);
    int64_t octets = m->block_size / 8, words = ck_tile_words(m);
    int chains = tokens == 1 ? 4 : tokens < 4 ? 2 : 1; /* sums that do not wait for each other */
    for (int64_t tile = begin; tile < end; tile++) {
        scale_walk walk = walk_scales(m, tile);
        const uint32_t *codes = m->codes + tile * words;
        v16 sums[MOST_DIRECT];
        UNROLL
        for (int t = 0; t < tokens; t++) sums[t] = v_zero();
        int64_t octet = 0;
        for (int64_t block = 0; block < m->blocks; block++) {
            v16 part[MOST_DIRECT][4];
            UNROLL
            for (int t = 0; t < tokens; t++)
                UNROLL
                for (int c = 0; c < chains; c++) part[t][c] = v_zero();
            int64_t stop = octet + octets;
            if (tokens == 1 && bits < 8 && octets % 4 == 0) /* whole chunks: places in it are constants */
                for (; octet < stop; octet += 4) {
                    const uint32_t *chunk = codes + octet / 4 * bits * CK_TILE;
                    UNROLL
                    for (int q = 0; q < 4; q++)
                        direct_octet(p, bits, table, chunk, octet + q, q, tokens, chains, part);
                }
            for (; octet < stop; octet++) {
                const uint32_t *chunk = codes + octet / 4 * bits * CK_TILE;
                direct_octet(p, bits, table, chunk, octet, (int)(octet % 4), tokens, chains, part);
            }
            v16 scale = next_scales(&walk);
            UNROLL
            for (int t = 0; t < tokens; t++) {
                v16 whole = part[t][0];
                UNROLL
                for (int c = 1; c < chains; c++) whole = v_add(whole, part[t][c]);
                sums[t] = v_fma(whole, scale, sums[t]);
            }
        }
        UNROLL
        for (int t = 0; t < tokens; t++) finish(p, tile, t, sums[t]);
    }
}

#ifdef PAIR_TILES
/* One token and 2-bit codes. A nibble holds the codes of two columns, f of an even octet and f of the next: one look-up
 * among the 16 sums that they can make serves both, and serves all tiles that are done together. */
INLINE void pair_tiles(const ck_product *p, int64_t first, int tiles) {
    const ck_matrix *m = p->matrix;
    const uint32_t *codes = m->codes + first * ck_tile_words(m);
    int64_t words = ck_tile_words(m), pairs = m->block_size / 16, pair = 0;
    float tables[2][16];
    for (int i = 0; i < 16; i++) {
        tables[0][i] = m->table[i & 3];
        tables[1][i] = m->table[i >> 2];
    }
    v16 low = v_load(tables[0]), high = v_load(tables[1]), sums[PAIR_TILES];
    scale_walk walks[PAIR_TILES];
    UNROLL
    for (int n = 0; n < tiles; n++) {
        sums[n] = v_zero();
        walks[n] = walk_scales(m, first + n);
    }
    for (int64_t block = 0; block < m->blocks; block++) {
        v16 part[PAIR_TILES];
        UNROLL
        for (int n = 0; n < tiles; n++) part[n] = v_zero();
        for (int64_t stop = pair + pairs; pair < stop; pair++) {
            const float *x = p->x + pair * 16;
            w16 nibbles[PAIR_TILES];
            UNROLL
            for (int n = 0; n < tiles; n++) {
                nibbles[n] = w_load(codes + n * words + pair * CK_TILE);
                __builtin_prefetch(codes + n * words + pair * CK_TILE + PREFETCHED / 4);
            }
            UNROLL
            for (int f = 0; f < 8; f++) {
                v16 both = v_fma(high, v_set(x[8 + f]), v_mul(low, v_set(x[f])));
                UNROLL
                for (int n = 0; n < tiles; n++)
                    part[n] = v_add(part[n], look_up(both, w_right(nibbles[n], 4 * f)));
            }
        }
        UNROLL
        for (int n = 0; n < tiles; n++) sums[n] = v_fma(part[n], next_scales(&walks[n]), sums[n]);
    }
    for (int n = 0; n < tiles; n++) finish(p, first + n, 0, sums[n]);
}

static void direct_pairs(const ck_product *p, int64_t begin, int64_t end) {
    for (; begin + PAIR_TILES <= end; begin += PAIR_TILES) pair_tiles(p, begin, PAIR_TILES);
    for (; begin < end; begin++) pair_tiles(p, begin, 1);
}
#endif

#define DIRECT(tokens) \
    case tokens: BY_BITS(p->matrix, direct_tiles, p, begin, end, tokens); break;

static void direct(const ck_product *p, int64_t begin, int64_t end) {
#ifdef PAIR_TILES
    if (p->tokens == 1 && p->matrix->bits == 2 && p->matrix->block_size % 16 == 0) {
        direct_pairs(p, begin, end);
        return;
    }
#endif
#if SPECIALIZED
    switch (p->tokens) {
        DIRECT(1)
        DIRECT(2)
        DIRECT(3)
#if MOST_DIRECT == 8
        DIRECT(4)
        DIRECT(5)
        DIRECT(6)
        DIRECT(7)
#endif
        default: BY_BITS(p->matrix, direct_tiles, p, begin, end, MOST_DIRECT);
    }
#else
    direct_tiles(p->matrix, (int)p->matrix->bits, p, begin, end, (int)p->tokens);
#endif
}

/* Decode octets first to last of a tile; the walk stands at the block of `first` with `scale` its scales. */
INLINE void decode(const ck_matrix *m, int bits, const uint32_t *tile, int64_t first, int64_t last, scale_walk *walk,
                   v16 *scale, float *to, int64_t pitch) {
    small_table table = matrix_table(m, bits);
    int64_t octets = m->block_size / 8;
    for (int64_t octet = first; octet < last; octet++) {
        v16 values[8];
        if (octet % octets == 0) *scale = next_scales(walk);
        octet_values(m, tile, bits, table, octet, values);
        UNROLL
        for (int f = 0; f < 8; f++) v_store(to + ((octet - first) * 8 + f) * pitch, v_mul(values[f], *scale));
    }
}

/* sums[tokens, tiles] += x[octets, tokens, 8] weights[8 * octets, tiles]. */
INLINE void multiply(const float *x, int64_t octets, const float *weights, float *sums, int tokens) {
    v16 s[PANEL_TOKENS][PANEL_TILES];
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
        for (int n = 0; n < PANEL_TILES; n++) s[t][n] = v_load(sums + (t * PANEL_TILES + n) * CK_TILE);
    for (int64_t octet = 0; octet < octets; octet++, x += 8 * tokens)
        for (int f = 0; f < 8; f++, weights += PANEL_TILES * CK_TILE) {
            v16 w[PANEL_TILES];
            UNROLL
            for (int n = 0; n < PANEL_TILES; n++) w[n] = v_load(weights + n * CK_TILE);
            UNROLL
            for (int t = 0; t < tokens; t++) {
                v16 value = v_set(x[t * 8 + f]);
                UNROLL
                for (int n = 0; n < PANEL_TILES; n++) s[t][n] = v_fma(w[n], value, s[t][n]);
            }
        }
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
        for (int n = 0; n < PANEL_TILES; n++) v_store(sums + (t * PANEL_TILES + n) * CK_TILE, s[t][n]);
}

#define MULTIPLY(tokens) \
    case tokens: multiply(x, octets, weights, sums, tokens); break;

static void multiply_any(const float *x, int64_t octets, const float *weights, float *sums, int64_t tokens) {
    switch (tokens) {
        MULTIPLY(1)
        MULTIPLY(2)
        MULTIPLY(3)
#if PANEL_TOKENS > 4
        MULTIPLY(4)
        MULTIPLY(5)
#endif
#if PANEL_TOKENS > 6
        MULTIPLY(6)
        MULTIPLY(7)
        MULTIPLY(8)
        MULTIPLY(9)
        MULTIPLY(10)
        MULTIPLY(11)
#endif
        default: multiply(x, octets, weights, sums, PANEL_TOKENS);
    }
}

/* A panel is [sets of PANEL_TILES tiles][columns][PANEL_TILES][16], sums are [sets][tokens][PANEL_TILES][16]. */
static void panel(const ck_product *p, float *workspace, int64_t begin, int64_t end) {
    const ck_matrix *m = p->matrix;
    int64_t width = PANEL_TILES * CK_TILE, most = p->tiles_at_once, octets = m->blocks * m->block_size / 8;
    int64_t per_set = CK_PANEL_COLUMNS * width, step = CK_PANEL_COLUMNS / 8;
    float *sums = workspace + most * CK_TILE * CK_PANEL_COLUMNS;
    scale_walk walks[8];
    v16 scales[8];
    for (int64_t group = begin; group < end; group++) {
        int64_t first = group * most, tiles = ck_min(most, ck_tiles(m) - first);
        int64_t sets = ck_ceil_div(tiles, PANEL_TILES);
        if (tiles % PANEL_TILES) /* the last set is not full: what is missing counts as zeros */
            memset(workspace + (sets - 1) * per_set, 0, (size_t)per_set * sizeof(float));
        memset(sums, 0, (size_t)(sets * p->tokens * width) * sizeof(float));
        for (int64_t i = 0; i < tiles; i++) walks[i] = walk_scales(m, first + i);
        for (int64_t octet = 0; octet < octets; octet += step) {
            int64_t last = ck_min(octet + step, octets);
            for (int64_t i = 0; i < tiles; i++) {
                float *to = workspace + i / PANEL_TILES * per_set + i % PANEL_TILES * CK_TILE;
                const uint32_t *codes = m->codes + (first + i) * ck_tile_words(m);
                BY_BITS(m, decode, codes, octet, last, &walks[i], &scales[i], to, width);
            }
            for (int64_t t = 0; t < p->tokens; t += PANEL_TOKENS) {
                int64_t together = ck_min(PANEL_TOKENS, p->tokens - t);
                const float *x = p->x + t * octets * 8 + octet * together * 8;
                for (int64_t set = 0; set < sets; set++)
                    multiply_any(x, last - octet, workspace + set * per_set, sums + (set * p->tokens + t) * width,
                                 together);
            }
        }
        for (int64_t i = 0; i < tiles; i++)
            for (int64_t t = 0; t < p->tokens; t++) {
                float *from = sums + (i / PANEL_TILES * p->tokens + t) * width + i % PANEL_TILES * CK_TILE;
                finish(p, first + i, t, v_load(from));
            }
    }
}

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

INLINE void dequantize_tile(const ck_matrix *m, int bits, int64_t tile, int64_t first_row, int64_t last_row, char *out,
                            int type) {
    int64_t size = ck_size(type), pitch = m->columns * size;
    scale_walk walk = walk_scales(m, tile);
    small_table table = matrix_table(m, bits);
    v16 scale = v_zero(), rows[16];
    const uint32_t *codes = m->codes + tile * ck_tile_words(m);
    int64_t from = first_row > tile * CK_TILE ? first_row - tile * CK_TILE : 0;
    int64_t to = ck_min(CK_TILE, last_row - tile * CK_TILE);
    out += (tile * CK_TILE - first_row) * pitch;
    if (type == CK_F32) {
        for (int64_t column = 0; column < m->columns; column += 16) {
            decode_16(m, bits, table, codes, column, &walk, &scale, rows);
            v_transpose(rows);
            write_rows(out + column * size, pitch, rows, from, to, (m->columns - column) * size);
        }
        return;
    }
    for (int64_t column = 0; column < m->columns; column += 32) { /* pairs of columns share a word */
        v16 columns[16];
        UNROLL
        for (int half = 0; half < 2; half++) {
            decode_16(m, bits, table, codes, column + 16 * half, &walk, &scale, columns);
            UNROLL
            for (int i = 0; i < 8; i++) rows[8 * half + i] = v_halves(columns[2 * i], columns[2 * i + 1], type);
        }
        v_transpose(rows);
        write_rows(out + column * size, pitch, rows, from, to, (m->columns - column) * size);
    }
}

static void dequantize(const ck_matrix *m, int64_t begin, int64_t end, int64_t first_row, int64_t last_row, void *out,
                       int type) {
    for (int64_t tile = begin; tile < end; tile++) BY_BITS(m, dequantize_tile, tile, first_row, last_row, out, type);
}

INLINE void inner_tokens(const ck_product *p, float *found, int64_t r, int64_t first, int tokens) {
    const ck_factors *f = p->factors;
    int64_t columns = p->matrix->columns, size = ck_size(p->type);
    const char *row = (const char *)f->right + r * columns * size, *x = (const char *)p->raw + first * columns * size;
    v16 sums[4];
    UNROLL
    for (int t = 0; t < tokens; t++) sums[t] = v_zero();
    for (int64_t k = 0; k < columns; k += 16) {
        int count = (int)ck_min(16, columns - k);
        v16 a = v_read(row + k * size, (int)p->type, count);
        UNROLL
        for (int t = 0; t < tokens; t++)
            sums[t] = v_fma(a, v_read(x + (t * columns + k) * size, (int)p->type, count), sums[t]);
    }
    UNROLL
    for (int t = 0; t < tokens; t++) found[(first + t) * f->rank + r] = v_sum(sums[t]);
}

/* inner[t, r] for r from begin to end: lanes run along the columns. */
static void inner(const ck_product *p, float *found, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
        int64_t t = 0;
        for (; t + 4 <= p->tokens; t += 4) inner_tokens(p, found, r, t, 4);
        for (; t < p->tokens; t++) inner_tokens(p, found, r, t, 1);
    }
}

/* Tokens begin to end of x as float32 into the order of the product's kernel. */
static void widen(const ck_product *p, float *to, int64_t begin, int64_t end) {
    int64_t width = p->matrix->blocks * p->matrix->block_size, columns = p->matrix->columns, size = ck_size(p->type);
    int64_t most = p->tokens <= MOST_DIRECT ? p->tokens : PANEL_TOKENS;
    for (int64_t t = begin; t < end; t++) {
        int64_t together = ck_min(most, p->tokens - t / most * most);
        float *place = to + t / most * most * width + t % most * 8;
        const char *from = (const char *)p->raw + t * columns * size;
        for (int64_t k = 0; k < width; k += 8) {
            int count = (int)(columns - k < 0 ? 0 : ck_min(8, columns - k));
            v_write(place + k * together, CK_F32, 8, v_read(from + k * size, (int)p->type, count));
        }
    }
}

/* Multiply and add in registers, 192 of them a round: how fast the processor can be at most. */
static float peak(int64_t rounds) {
    v16 sums[12], factor = v_set(0.5f);
    UNROLL
    for (int i = 0; i < 12; i++) sums[i] = v_set((float)i);
    for (int64_t round = 0; round < rounds; round++) {
        UNROLL
        for (int i = 0; i < 12; i++) sums[i] = v_fma(sums[i], factor, factor);
    }
    float total = 0;
    for (int i = 0; i < 12; i++) total += v_sum(sums[i]);
    return total;
}
