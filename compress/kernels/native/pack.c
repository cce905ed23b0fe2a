/* From the plain serialization to the packed layout and back, without loss. */
#include "matrix.h"

typedef struct {
    uint8_t *plain, *plain_scales;
    uint32_t *codes;
    uint8_t *scales;
    int64_t rows, blocks, block_size;
    int bits, scale_bits;
} move;

/* The bits of a byte, one into the lowest bit of each nibble; and back. */
static uint32_t spread_bits(uint32_t x) {
    x = (x | x << 12) & 0x000f000f;
    x = (x | x << 6) & 0x03030303;
    return (x | x << 3) & 0x11111111;
}

static uint8_t gather_bits(uint32_t x) {
    x &= 0x11111111;
    x = (x | x >> 3) & 0x03030303;
    x = (x | x >> 6) & 0x000f000f;
    return (uint8_t)(x | x >> 12);
}

/* The same for eight pairs of bits. */
static uint32_t spread_pairs(uint32_t x) {
    x = (x | x << 8) & 0x00ff00ff;
    x = (x | x << 4) & 0x0f0f0f0f;
    return (x | x << 2) & 0x33333333;
}

static uint16_t gather_pairs(uint32_t x) {
    x &= 0x33333333;
    x = (x | x >> 2) & 0x0f0f0f0f;
    x = (x | x >> 4) & 0x00ff00ff;
    return (uint16_t)(x | x >> 8);
}

static uint32_t little_endian(const uint8_t *p, int bytes) {
    uint32_t word = 0;
    for (int i = 0; i < bytes; i++) word |= (uint32_t)p[i] << (8 * i);
    return word;
}

static void put_little_endian(uint8_t *p, int bytes, uint32_t word) {
    for (int i = 0; i < bytes; i++) p[i] = (uint8_t)(word >> (8 * i));
}

/* Octet `at` of the plain codes (eight codes, `octets` in all) into octet q of a lane of a chunk that holds zeros. */
static void pack_octet(const uint8_t *plain, int64_t octets, int64_t at, int bits, uint32_t *words, int q) {
    switch (bits) {
        case 4: words[q * CK_TILE] = little_endian(plain + 4 * at, 4); break;
        case 8:
            words[2 * q * CK_TILE] = little_endian(plain + 8 * at, 4);
            words[(2 * q + 1) * CK_TILE] = little_endian(plain + 8 * at + 4, 4);
            break;
        default:
            words[q / 2 * CK_TILE] |= spread_pairs(little_endian(plain + 2 * at, 2)) << (2 * (q % 2));
            if (bits == 3) words[2 * CK_TILE] |= spread_bits(plain[2 * octets + at]) << q;
    }
}

static void unpack_octet(uint8_t *plain, int64_t octets, int64_t at, int bits, const uint32_t *words, int q) {
    switch (bits) {
        case 4: put_little_endian(plain + 4 * at, 4, words[q * CK_TILE]); break;
        case 8:
            put_little_endian(plain + 8 * at, 4, words[2 * q * CK_TILE]);
            put_little_endian(plain + 8 * at + 4, 4, words[(2 * q + 1) * CK_TILE]);
            break;
        default:
            put_little_endian(plain + 2 * at, 2, gather_pairs(words[q / 2 * CK_TILE] >> (2 * (q % 2))));
            if (bits == 3) plain[2 * octets + at] = gather_bits(words[2 * CK_TILE] >> q);
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
            for (int64_t octet = 0; octet < width / 8; octet++) {
                uint32_t *chunk = m->codes + (tile * chunks + octet / 4) * chunk_words;
                int64_t at = row * (width / 8) + octet;
                pack_octet(m->plain, m->rows * (width / 8), at, m->bits, chunk + lane, (int)(octet % 4));
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
        for (int64_t octet = 0; octet < width / 8; octet++) {
            const uint32_t *chunk = tile + octet / 4 * m->bits * CK_TILE;
            int64_t at = row * (width / 8) + octet;
            unpack_octet(m->plain, m->rows * (width / 8), at, m->bits, chunk + row % CK_TILE, (int)(octet % 4));
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

/* The inverse; `plain_scales` must hold zeros. */
CK_EXPORT void ck_unpack(uint8_t *plain, uint8_t *plain_scales, const uint32_t *codes, const uint8_t *scales,
                         int64_t rows, int64_t blocks, int64_t block_size, int bits, int scale_bits, int threads) {
    move m = {.plain = plain, .plain_scales = plain_scales, .codes = (uint32_t *)codes, .scales = (uint8_t *)scales,
              .rows = rows, .blocks = blocks, .block_size = block_size, .bits = bits, .scale_bits = scale_bits};
    ck_parallel(rows, 1, threads, unpack_rows, &m);
    unpack_scales(&m, 0, rows * blocks);
}
