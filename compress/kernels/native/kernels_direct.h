/* Products with few tokens: codes are decoded in registers. */
#ifndef CK_KERNELS_DIRECT_H
#define CK_KERNELS_DIRECT_H

#include "kernels_decode.h"

/* Whether so few tokens that codes are decoded in registers. */
static int is_direct(const ck_matrix *m, int64_t tokens, int64_t type) {
#ifdef BF16_PAIRS
    if (type == CK_BF16) return m->bits < 8 && tokens <= 2 * MOST_DIRECT; /* 8-bit look-ups are dear, wherever done */
#else
    (void)m, (void)type;
#endif
    return tokens <= MOST_DIRECT;
}

/* Add the low-rank part to the sums of some tokens, `pitch` floats apart, and write them. */
INLINE void finish_some(const ck_product *p, int64_t tile, int64_t token, int tokens, const float *sums,
                        int64_t pitch) {
    const ck_factors *f = p->factors;
    int lanes = lanes_of(p->matrix, tile);
    int64_t row = tile * CK_TILE, rows = p->matrix->rows, size = ck_size(p->type);
    v16 s[4];
    UNROLL
    for (int t = 0; t < tokens; t++) s[t] = v_load(sums + t * pitch);
    if (f) {
        const char *left = (const char *)f->left + row * size;
        const float *inner = p->inner + token * f->rank;
        for (int64_t r = 0; r < f->rank; r++) {
            v16 factor = v_read(left + r * rows * size, (int)p->type, lanes);
            UNROLL
            for (int t = 0; t < tokens; t++) s[t] = v_fma(factor, v_set(inner[t * f->rank + r]), s[t]);
        }
    }
    UNROLL
    for (int t = 0; t < tokens; t++)
        v_write((char *)p->y + ((token + t) * rows + row) * size, (int)p->type, lanes, s[t]);
}

static __attribute__((noinline)) void finish(const ck_product *p, int64_t tile, int64_t token, int64_t tokens,
                                             const float *sums, int64_t pitch) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) finish_some(p, tile, token + t, 4, sums + t * pitch, pitch);
    for (; t < tokens; t++) finish_some(p, tile, token + t, 1, sums + t * pitch, pitch);
}

#define PREFETCHED 512 /* words: a single token is done with a cache line sooner than memory brings the next */

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
        float found[MOST_DIRECT * CK_TILE];
        UNROLL
        for (int t = 0; t < tokens; t++) v_store(found + t * CK_TILE, sums[t]);
        finish(p, tile, 0, tokens, found, CK_TILE);
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
    for (int n = 0; n < tiles; n++) {
        float found[CK_TILE];
        v_store(found, sums[n]);
        finish(p, first + n, 0, 1, found, CK_TILE);
    }
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

#endif
