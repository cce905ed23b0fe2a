/* From the plain serialization to the packed layout and back, without loss. */
#include "matrix.h"

typedef struct {
    uint8_t *plain, *plain_scales;
    uint32_t *codes;
    uint8_t *scales;
    int64_t rows, blocks, block_size;
    int bits, scale_bits;
} move;

static void put_chunk_code(uint32_t *chunk, int bits, int lane, int column, unsigned code) {
    int q = column / 8, f = column % 8;
    uint32_t *words = chunk + lane;
    switch (bits) {
        case 2: words[q / 2 * CK_TILE] |= code << (4 * f + 2 * (q % 2)); break;
        case 3:
            words[q / 2 * CK_TILE] |= (code & 3) << (4 * f + 2 * (q % 2));
            words[2 * CK_TILE] |= (code >> 2) << (4 * f + q);
            break;
        case 4: words[q * CK_TILE] |= code << (4 * f); break;
        default: words[column / 4 * CK_TILE] |= (uint32_t)code << (8 * (column % 4));
    }
}

/* Set code `at` among `count` packed plainly. Bytes begin as zeros. */
static void put_plain_code(uint8_t *packed, int bits, int64_t count, int64_t at, unsigned code) {
    switch (bits) {
        case 2: packed[at / 4] |= (uint8_t)(code << (2 * (at % 4))); break;
        case 3:
            packed[at / 4] |= (uint8_t)((code & 3) << (2 * (at % 4)));
            packed[ck_ceil_div(count, 4) + at / 8] |= (uint8_t)((code >> 2) << (at % 8));
            break;
        case 4: packed[at / 2] |= (uint8_t)(code << (4 * (at % 2))); break;
        default: packed[at] = (uint8_t)code;
    }
}

static void pack_tiles(void *argument, int64_t begin, int64_t end) {
    const move *m = argument;
    int64_t width = m->blocks * m->block_size, chunks = ck_ceil_div(width, CK_CHUNK);
    int64_t chunk_words = (int64_t)m->bits * CK_TILE, group = 2 * m->scale_bits;
    memset(m->codes + begin * chunks * chunk_words, 0, (size_t)((end - begin) * chunks * chunk_words) * 4);
    memset(m->scales + begin * m->blocks * group, 0, (size_t)((end - begin) * m->blocks * group));
    for (int64_t tile = begin; tile < end; tile++) {
        int lanes = (int)ck_min(CK_TILE, m->rows - tile * CK_TILE);
        for (int lane = 0; lane < lanes; lane++) {
            int64_t row = tile * CK_TILE + lane;
            for (int64_t column = 0; column < width; column++) {
                uint32_t *chunk = m->codes + (tile * chunks + column / CK_CHUNK) * chunk_words;
                unsigned code = ck_plain_code(m->plain, m->bits, m->rows * width, row * width + column);
                put_chunk_code(chunk, m->bits, lane, (int)(column % CK_CHUNK), code);
            }
            for (int64_t block = 0; block < m->blocks; block++) {
                int64_t at = row * m->blocks + block;
                unsigned code = ck_plain_code(m->plain_scales, m->scale_bits, m->rows * m->blocks, at);
                uint8_t *to = m->scales + (tile * m->blocks + block) * group;
                put_plain_code(to, m->scale_bits, CK_TILE, lane, code);
            }
        }
    }
}

static void unpack_scales(const move *m, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at++) {
        int64_t row = at / m->blocks, block = at % m->blocks, tile = row / CK_TILE;
        const uint8_t *from = m->scales + (tile * m->blocks + block) * 2 * m->scale_bits;
        unsigned code = ck_plain_code(from, m->scale_bits, CK_TILE, row % CK_TILE);
        put_plain_code(m->plain_scales, m->scale_bits, m->rows * m->blocks, at, code);
    }
}

/* Rows begin to end; a row is a multiple of 8 codes, so no two threads write one byte of codes. */
static void unpack_rows(void *argument, int64_t begin, int64_t end) {
    const move *m = argument;
    int64_t width = m->blocks * m->block_size, chunks = ck_ceil_div(width, CK_CHUNK);
    for (int64_t row = begin; row < end; row++) {
        const uint32_t *tile = m->codes + row / CK_TILE * chunks * m->bits * CK_TILE;
        for (int64_t column = 0; column < width; column++) {
            const uint32_t *chunk = tile + column / CK_CHUNK * m->bits * CK_TILE;
            unsigned code = ck_chunk_code(chunk, m->bits, row % CK_TILE, (int)(column % CK_CHUNK));
            put_plain_code(m->plain, m->bits, m->rows * width, row * width + column, code);
        }
    }
}

/* Plain codes and scale codes into the packed layout; every word of the result is written. */
CK_EXPORT void ck_pack(const uint8_t *plain, const uint8_t *plain_scales, uint32_t *codes, uint8_t *scales,
                       int64_t rows, int64_t blocks, int64_t block_size, int bits, int scale_bits, int threads) {
    move m = {.plain = (uint8_t *)plain, .plain_scales = (uint8_t *)plain_scales, .codes = codes, .scales = scales,
              .rows = rows, .blocks = blocks, .block_size = block_size, .bits = bits, .scale_bits = scale_bits};
    ck_parallel(ck_ceil_div(rows, CK_TILE), 1, threads, pack_tiles, &m);
}

/* The inverse; `plain` and `plain_scales` must hold zeros. */
CK_EXPORT void ck_unpack(uint8_t *plain, uint8_t *plain_scales, const uint32_t *codes, const uint8_t *scales,
                         int64_t rows, int64_t blocks, int64_t block_size, int bits, int scale_bits, int threads) {
    move m = {.plain = plain, .plain_scales = plain_scales, .codes = (uint32_t *)codes, .scales = (uint8_t *)scales,
              .rows = rows, .blocks = blocks, .block_size = block_size, .bits = bits, .scale_bits = scale_bits};
    ck_parallel(rows, 1, threads, unpack_rows, &m);
    unpack_scales(&m, 0, rows * blocks);
}
