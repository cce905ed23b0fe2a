/* Products where the processor multiplies pairs of bfloat16: table entries are rounded to it, scales are not.
 *
 * A word of 32 bits holds two columns of an octet, f and f + 4: their codes lie in the two halves of a word of codes,
 * so one permutation looks both up, and one instruction multiplies and adds both. A block's sum is multiplied by its
 * scale. Inputs are widened in the same order, [pieces][sets of tokens][octets of a piece][tokens of a set][4 words]:
 * a piece is all octets where codes are decoded in registers, and the columns of a panel otherwise.
 */
#ifndef CK_KERNELS_PAIRS_H
#define CK_KERNELS_PAIRS_H

#include "kernels_panel.h"

#define TILES_AT_ONCE 4 /* tiles that few tokens are multiplied with at a time, at most */
#define PAIR_TOKENS 6     /* tokens that a panel is multiplied with at a time */

/* Octets of the piece of x that begins at octet `first`: all, or as many as a panel has. */
static inline int64_t octets_together(const ck_product *p, int64_t first) {
    int64_t all = p->matrix->blocks * p->matrix->block_size / 8;
    return is_direct(p->matrix, p->tokens, p->type) ? all : ck_min(CK_PANEL_COLUMNS / 8, all - first);
}

static void widen_pairs(const ck_product *p, float *to, int64_t begin, int64_t end) {
    int64_t octets = p->matrix->blocks * p->matrix->block_size / 8, columns = p->matrix->columns;
    int64_t most = is_direct(p->matrix, p->tokens, p->type) ? MOST_DIRECT : PAIR_TOKENS;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = t / most * most, together = ck_min(most, p->tokens - first);
        const char *from = (const char *)p->raw + t * columns * 2;
        for (int64_t octet = 0, count; octet < octets; octet += count) {
            count = octets_together(p, octet);
            float *place = to + (octet * p->tokens + first * count + t - first) * 4;
            for (int64_t k = octet * 8; k < (octet + count) * 8; k += 8, place += 4 * together) {
                int64_t present = ck_min(8, columns - k);
                uint16_t padded[8] = {0};
                if (present > 0 && present < 8) memcpy(padded, from + k * 2, (size_t)present * 2);
                pair_halves(place, present == 8 ? (const void *)(from + k * 2) : padded);
            }
        }
    }
}

/* Add the products of octet q of a chunk, `octet` in the row, to the sums of its block. */
INLINE void pair_octet(const float *x, int bits, pair_table table, const uint32_t *chunk, int64_t words,
                       int64_t octet, int q, int tiles, int tokens, v16 part[][MOST_DIRECT]) {
    x += octet * tokens * 4;
    w16 nibbles[TILES_AT_ONCE];
    UNROLL
    for (int n = 0; n < tiles; n++) {
        nibbles[n] = octet_nibbles(chunk + n * words, bits, q);
        __builtin_prefetch(chunk + n * words + q * bits * (CK_TILE / 4) + PREFETCHED);
    }
    UNROLL
    for (int f = 0; f < 4; f++) {
        v16 w[TILES_AT_ONCE];
        UNROLL
        for (int n = 0; n < tiles; n++) w[n] = look_up_pairs(table, w_right(nibbles[n], 4 * f));
        UNROLL
        for (int t = 0; t < tokens; t++) {
            v16 value = v_set(x[t * 4 + f]);
            UNROLL
            for (int n = 0; n < tiles; n++) part[n][t] = v_dot_pairs(w[n], value, part[n][t]);
        }
    }
}

/* y of `tokens` tokens from token `t0` on and `tiles` tiles side by side: enough sums that none waits for itself. */
INLINE void few_tokens(const ck_product *p, int64_t t0, int tokens, int bits, int64_t first, int tiles) {
    const ck_matrix *m = p->matrix;
    pair_table table = pair_table_load(m->table, bits);
    int64_t octets = m->block_size / 8, words = ck_tile_words(m), octet = 0;
    const uint32_t *codes = m->codes + first * words;
    const float *x = p->x + t0 * m->blocks * octets * 4;
    v16 sums[TILES_AT_ONCE][MOST_DIRECT];
    scale_walk walks[TILES_AT_ONCE];
    UNROLL
    for (int n = 0; n < tiles; n++) {
        walks[n] = walk_scales(m, first + n);
        UNROLL
        for (int t = 0; t < tokens; t++) sums[n][t] = v_zero();
    }
    for (int64_t block = 0; block < m->blocks; block++) {
        v16 part[TILES_AT_ONCE][MOST_DIRECT];
        UNROLL
        for (int n = 0; n < tiles; n++)
            UNROLL
            for (int t = 0; t < tokens; t++) part[n][t] = v_zero();
        int64_t stop = octet + octets;
        if (octets % 4 == 0) /* whole chunks: places in it are constants */
            for (; octet < stop; octet += 4) {
                const uint32_t *chunk = codes + octet / 4 * bits * CK_TILE;
                UNROLL
                for (int q = 0; q < 4; q++)
                    pair_octet(x, bits, table, chunk, words, octet + q, q, tiles, tokens, part);
            }
        for (; octet < stop; octet++) {
            const uint32_t *chunk = codes + octet / 4 * bits * CK_TILE;
            pair_octet(x, bits, table, chunk, words, octet, (int)(octet % 4), tiles, tokens, part);
        }
        UNROLL
        for (int n = 0; n < tiles; n++) {
            v16 scale = next_scales(&walks[n]);
            UNROLL
            for (int t = 0; t < tokens; t++) sums[n][t] = v_fma(part[n][t], scale, sums[n][t]);
        }
    }
    for (int n = 0; n < tiles; n++) {
        float found[MOST_DIRECT * CK_TILE];
        UNROLL
        for (int t = 0; t < tokens; t++) v_store(found + t * CK_TILE, sums[n][t]);
        finish(p, first + n, t0, tokens, found, CK_TILE);
    }
}

INLINE void few_tokens_of(const ck_product *p, int64_t t0, int tokens, int bits, int64_t begin, int64_t end) {
    int tiles = tokens > 6 ? 3 : TILES_AT_ONCE; /* 24 sums fit beside what they are made of */
    for (; begin + tiles <= end; begin += tiles) few_tokens(p, t0, tokens, bits, begin, tiles);
    for (; begin + 2 <= end; begin += 2) few_tokens(p, t0, tokens, bits, begin, 2);
    if (begin < end) few_tokens(p, t0, tokens, bits, begin, 1);
}

#define FEW_TOKENS(tokens) \
    case tokens: few_tokens_of(p, t0, tokens, bits, begin, end); break;

INLINE void few_tokens_any(const ck_product *p, int64_t t0, int64_t tokens, int bits, int64_t begin, int64_t end) {
#if SPECIALIZED
    switch (tokens) {
        FEW_TOKENS(1)
        FEW_TOKENS(2)
        FEW_TOKENS(3)
        FEW_TOKENS(4)
        FEW_TOKENS(5)
        FEW_TOKENS(6)
        FEW_TOKENS(7)
        default: few_tokens_of(p, t0, MOST_DIRECT, bits, begin, end);
    }
#else
    few_tokens_of(p, t0, (int)tokens, bits, begin, end);
#endif
}

/* Tiles in groups that are still in a cache when the next set of tokens comes to them. */
static void direct_by_pairs(const ck_product *p, int64_t begin, int64_t end) {
    for (int64_t last; begin < end; begin = last) {
        last = ck_min(end, begin + 4 * 3);
        for (int64_t t0 = 0; t0 < p->tokens; t0 += MOST_DIRECT) {
            int64_t tokens = ck_min(MOST_DIRECT, p->tokens - t0);
            switch (p->matrix->bits) {
                case 2: few_tokens_any(p, t0, tokens, 2, begin, last); break;
                case 3: few_tokens_any(p, t0, tokens, 3, begin, last); break;
                default: few_tokens_any(p, t0, tokens, 4, begin, last);
            }
        }
    }
}

/* found[t, r] for `tokens` tokens: pairs of columns as they lie. */
INLINE void inner_pairs(const ck_product *p, float *found, int64_t r, int64_t first, int tokens) {
    int64_t columns = p->matrix->columns;
    const uint16_t *row = (const uint16_t *)p->factors->right + r * columns;
    const uint16_t *x = (const uint16_t *)p->raw + first * columns;
    v16 sums[4];
    UNROLL
    for (int t = 0; t < tokens; t++) sums[t] = v_zero();
    for (int64_t k = 0; k < columns; k += 32) {
        int count = (int)ck_min(32, columns - k);
        v16 a = read_pairs(row + k, count);
        UNROLL
        for (int t = 0; t < tokens; t++) sums[t] = v_dot_pairs(a, read_pairs(x + t * columns + k, count), sums[t]);
    }
    UNROLL
    for (int t = 0; t < tokens; t++) found[(first + t) * p->factors->rank + r] = v_sum(sums[t]);
}

/* Table entries of octets first to last of a tile as pairs, and the scales of the blocks that they begin or go on. */
INLINE void decode_pairs(const ck_matrix *m, int bits, const uint32_t *tile, int64_t first, int64_t last,
                         scale_walk *walk, v16 *scale, float *to, float *scales, int64_t pitch) {
    pair_table table = pair_table_load(m->table, bits == 8 ? 2 : bits);
    int64_t octets = m->block_size / 8;
    for (int64_t octet = first; octet < last; octet++, to += 4 * pitch) {
        if (octet % octets == 0) *scale = next_scales(walk);
        if (octet % octets == 0 || octet == first) {
            v_store(scales, *scale);
            scales += pitch;
        }
        if (bits == 8) {
            v16 values[8];
            octet_values(m, tile, bits, table_load(m->table, 2), octet, values);
            UNROLL
            for (int f = 0; f < 4; f++) v_store(to + f * pitch, v_pair(values[f], values[f + 4]));
            continue;
        }
        const uint32_t *chunk = tile + octet / 4 * bits * CK_TILE;
        __builtin_prefetch(chunk + octet % 4 * bits * (CK_TILE / 4) + CK_PANEL_COLUMNS / CK_CHUNK * bits * CK_TILE);
        w16 nibbles = octet_nibbles(chunk, bits, (int)(octet % 4));
        UNROLL
        for (int f = 0; f < 4; f++) v_store(to + f * pitch, look_up_pairs(table, w_right(nibbles, 4 * f)));
    }
}

/* sums[tokens, tiles] += x weights for octets first to last: of each block, scales[tiles] * (x[octets, tokens, 4]
 * weights[4 * octets, tiles]). The sums stay in registers, so they are half as many as in panels of floats. */
INLINE void multiply_pairs(const float *x, int64_t first, int64_t last, int64_t per_block, const float *weights,
                           const float *scales, float *sums, int tokens) {
    v16 s[PAIR_TOKENS][PANEL_TILES];
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
        for (int n = 0; n < PANEL_TILES; n++) s[t][n] = v_load(sums + (t * PANEL_TILES + n) * CK_TILE);
    for (int64_t stop = first / per_block * per_block + per_block; first < last; stop += per_block) {
        v16 part[PAIR_TOKENS][PANEL_TILES];
        UNROLL
        for (int t = 0; t < tokens; t++)
            UNROLL
            for (int n = 0; n < PANEL_TILES; n++) part[t][n] = v_zero();
        for (int64_t end = ck_min(stop, last); first < end; first++, x += 4 * tokens)
            for (int f = 0; f < 4; f++, weights += PANEL_TILES * CK_TILE) {
                v16 w[PANEL_TILES];
                UNROLL
                for (int n = 0; n < PANEL_TILES; n++) w[n] = v_load(weights + n * CK_TILE);
                UNROLL
                for (int t = 0; t < tokens; t++) {
                    v16 value = v_set(x[t * 4 + f]);
                    UNROLL
                    for (int n = 0; n < PANEL_TILES; n++) part[t][n] = v_dot_pairs(w[n], value, part[t][n]);
                }
            }
        UNROLL
        for (int n = 0; n < PANEL_TILES; n++) {
            v16 scale = v_load(scales + n * CK_TILE);
            UNROLL
            for (int t = 0; t < tokens; t++) s[t][n] = v_fma(part[t][n], scale, s[t][n]);
        }
        scales += PANEL_TILES * CK_TILE;
    }
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
        for (int n = 0; n < PANEL_TILES; n++) v_store(sums + (t * PANEL_TILES + n) * CK_TILE, s[t][n]);
}

#define MULTIPLY_PAIRS(tokens) \
    case tokens: multiply_pairs(x, first, last, per_block, weights, scales, sums, tokens); break;

INLINE void multiply_any_pairs(const float *x, int64_t first, int64_t last, int64_t per_block, const float *weights,
                               const float *scales, float *sums, int64_t tokens) {
    switch (tokens) {
        MULTIPLY_PAIRS(1)
        MULTIPLY_PAIRS(2)
        MULTIPLY_PAIRS(3)
        MULTIPLY_PAIRS(4)
        MULTIPLY_PAIRS(5)
        default: multiply_pairs(x, first, last, per_block, weights, scales, sums, PAIR_TOKENS);
    }
}

/* A panel has half as many words as one of floats; the room that this leaves of a set holds scales,
 * [blocks][PANEL_TILES][16]. */
static void panel_by_pairs(const ck_product *p, float *workspace, int64_t begin, int64_t end) {
    const ck_matrix *m = p->matrix;
    int64_t per_block = m->block_size / 8, octets = m->blocks * per_block, step = CK_PANEL_COLUMNS / 8;
    panel_group g;
    for (int64_t group = begin; group < end; group++) {
        begin_group(&g, p, workspace, group);
        for (int64_t octet = 0; octet < octets; octet += step) {
            int64_t last = ck_min(octet + step, octets);
            for (int64_t i = 0; i < g.tiles; i++) {
                float *to = place_of(&g, i);
                BY_BITS(m, decode_pairs, codes_of(&g, m, i), octet, last, &g.walks[i], &g.scales[i], to,
                        to + g.per_set / 2, g.width);
            }
            for (int64_t set = 0; set < g.sets; set++)
                for (int64_t t = 0; t < p->tokens; t += PAIR_TOKENS) {
                    int64_t together = ck_min(PAIR_TOKENS, p->tokens - t);
                    const float *from = g.panel + set * g.per_set;
                    multiply_any_pairs(p->x + (octet * p->tokens + t * (last - octet)) * 4, octet, last, per_block,
                                       from, from + g.per_set / 2, g.sums + (set * p->tokens + t) * g.width, together);
                }
        }
        end_group(&g, p);
    }
}

#endif
