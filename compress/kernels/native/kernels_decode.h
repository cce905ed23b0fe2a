/* Decoding of tiles: scales block after block, codes octet after octet.
 *
 * An octet is 8 columns, the unit that one vector of nibbles holds; octets never cross a block of scales.
 */
#ifndef CK_KERNELS_DECODE_H
#define CK_KERNELS_DECODE_H

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
    places at;          /* at the block where `left` was found */
    int32_t left, next; /* blocks until a lane enters another group, then and now */
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
    walk.left = walk.next = places_left(&walk.at, (int32_t)size);
    walk.steps = places_steps(&walk.at, m->steps, (int32_t)m->groups);
    walk.offset = v_set(m->offset[0]);
    return walk;
}

/* The scales of the present block; then on to the next. Two roundings, as the reference has them. */
INLINE v16 next_scales(scale_walk *walk) {
    const ck_matrix *m = walk->m;
    v16 scale = v_add(v_mul(scale_codes(walk->codes, (int)m->scale_bits), walk->steps), walk->offset);
    walk->codes += 2 * m->scale_bits;
    if (--walk->next == 0) {
        places_step(&walk->at, walk->left, (int32_t)m->group_size);
        walk->left = walk->next = places_left(&walk->at, (int32_t)m->group_size);
        walk->steps = places_steps(&walk->at, m->steps, (int32_t)m->groups);
    }
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

#endif
