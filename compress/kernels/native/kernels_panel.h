/* Products with more tokens: tiles are decoded into the cache, then multiplied with blocks of tokens. */
#ifndef CK_KERNELS_PANEL_H
#define CK_KERNELS_PANEL_H

#include "kernels_direct.h"

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
        for (int f = 0; f < 8; f++) values[f] = v_mul(values[f], *scale);
        UNROLL
        for (int f = 0; f < 8; f++) v_store(to + ((octet - first) * 8 + f) * pitch, values[f]);
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

INLINE void multiply_any(const float *x, int64_t octets, const float *weights, float *sums, int64_t tokens) {
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

/* What a group of tiles needs while it is multiplied: a panel, [sets of PANEL_TILES tiles][columns][PANEL_TILES][16],
 * and sums, [sets][tokens][PANEL_TILES][16]. */
typedef struct {
    int64_t first, tiles, sets; /* the first tile, and how many there are */
    int64_t width, per_set;     /* floats of a column and of a set of the panel */
    float *panel, *sums;
    scale_walk walks[8];
    v16 scales[8];
} panel_group;

INLINE void begin_group(panel_group *g, const ck_product *p, float *workspace, int64_t group) {
    const ck_matrix *m = p->matrix;
    int64_t most = p->tiles_at_once;
    g->first = group * most;
    g->tiles = ck_min(most, ck_tiles(m) - g->first);
    g->sets = ck_ceil_div(g->tiles, PANEL_TILES);
    g->width = PANEL_TILES * CK_TILE;
    g->per_set = CK_PANEL_COLUMNS * g->width;
    g->panel = workspace;
    g->sums = workspace + most * CK_TILE * CK_PANEL_COLUMNS;
    if (g->tiles % PANEL_TILES) /* the last set is not full: what is missing counts as zeros */
        memset(g->panel + (g->sets - 1) * g->per_set, 0, (size_t)g->per_set * sizeof(float));
    memset(g->sums, 0, (size_t)(g->sets * p->tokens * g->width) * sizeof(float));
    for (int64_t i = 0; i < g->tiles; i++) g->walks[i] = walk_scales(m, g->first + i);
}

/* Where the panel has a tile of the group. */
INLINE float *place_of(const panel_group *g, int64_t tile) {
    return g->panel + tile / PANEL_TILES * g->per_set + tile % PANEL_TILES * CK_TILE;
}

INLINE const uint32_t *codes_of(const panel_group *g, const ck_matrix *m, int64_t tile) {
    return m->codes + (g->first + tile) * ck_tile_words(m);
}

INLINE void end_group(const panel_group *g, const ck_product *p) {
    for (int64_t i = 0; i < g->tiles; i++)
        finish(p, g->first + i, 0, p->tokens,
               g->sums + i / PANEL_TILES * p->tokens * g->width + i % PANEL_TILES * CK_TILE, g->width);
}

static void panel(const ck_product *p, float *workspace, int64_t begin, int64_t end) {
    const ck_matrix *m = p->matrix;
    int64_t octets = m->blocks * m->block_size / 8, step = CK_PANEL_COLUMNS / 8;
    panel_group g;
    for (int64_t group = begin; group < end; group++) {
        begin_group(&g, p, workspace, group);
        for (int64_t octet = 0; octet < octets; octet += step) {
            int64_t last = ck_min(octet + step, octets);
            for (int64_t i = 0; i < g.tiles; i++)
                BY_BITS(m, decode, codes_of(&g, m, i), octet, last, &g.walks[i], &g.scales[i], place_of(&g, i), g.width);
            for (int64_t t = 0; t < p->tokens; t += PANEL_TOKENS) {
                int64_t together = ck_min(PANEL_TOKENS, p->tokens - t);
                const float *x = p->x + (t * octets + octet * together) * 8;
                for (int64_t set = 0; set < g.sets; set++)
                    multiply_any(x, last - octet, g.panel + set * g.per_set,
                                 g.sums + (set * p->tokens + t) * g.width, together);
            }
        }
        end_group(&g, p);
    }
}

#endif
