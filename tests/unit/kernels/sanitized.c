/* Every kernel on odd sizes, in buffers of exactly the size that it may touch: a program for the sanitizers.
 *
 * Built and run by test_sanitized.py. Prints what differs from the definition; returns how much that was.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "../../../compress/kernels/native/kernels.h"

int ck_best_level(void);
int ck_set_level(int level);
void ck_pack(const uint8_t *, const uint8_t *, uint32_t *, uint8_t *, int64_t, int64_t, int64_t, int, int, int);
void ck_unpack(uint8_t *, uint8_t *, const uint32_t *, const uint8_t *, int64_t, int64_t, int64_t, int, int, int);
int64_t ck_linear_floats(const ck_matrix *, int64_t, int64_t, int64_t);
void ck_linear(const ck_matrix *, const void *, void *, int64_t, int64_t, const void *, const void *, int64_t, float *,
               float *, int64_t);
void ck_dequantize(const ck_matrix *, int64_t, int64_t, int64_t, int64_t, void *, int64_t, int64_t);

static uint32_t state = 1;
static int wrong = 0;

static uint32_t draw(void) { return (state = state * 1664525u + 1013904223u) >> 8; }

static float number(void) { return (float)(draw() % 2001) / 1000.0f - 1.0f; }

static void *bytes(int64_t count) {
    uint8_t *p = malloc((size_t)count + !count);
    for (int64_t i = 0; i < count; i++) p[i] = (uint8_t)draw();
    return p;
}

static float *floats(int64_t count) {
    float *p = malloc((size_t)count * 4 + !count);
    for (int64_t i = 0; i < count; i++) p[i] = number();
    return p;
}

/* As bfloat16, and as the float32 that these are. */
static uint16_t *halves(float *from, int64_t count, int rounded) {
    uint16_t *p = malloc((size_t)count * 2 + !count);
    for (int64_t i = 0; i < count; i++) {
        p[i] = ck_to_bf16(from[i]);
        if (rounded) from[i] = ck_from_bf16(p[i]);
    }
    return p;
}

static void expect(int holds, const char *what, const ck_matrix *m, int64_t tokens) {
    if (holds) return;
    wrong++;
    printf("%s differs: level %d, %lld x %lld, %lld bits, %lld tokens\n", what, ck_level(), (long long)m->rows,
           (long long)m->columns, (long long)m->bits, (long long)tokens);
}

static int64_t plain_bytes(int64_t count, int64_t bits) {
    return bits == 3 ? ck_ceil_div(count, 4) + ck_ceil_div(count, 8) : ck_ceil_div(count * bits, 8);
}

/* Where there are instructions for pairs of bfloat16, table entries are rounded to it before they are multiplied. */
static int rounds_entries(int64_t type) { return type == CK_BF16 && ck_level() == CK_AVX512_BF16; }

static void product(const ck_matrix *m, const double *weights, int64_t tokens, int64_t type, int64_t rank, int threads) {
    float *x = floats(tokens * m->columns), *left = floats(rank * m->rows), *right = floats(rank * m->columns);
    int64_t size = ck_size(type);
    int wide = type == CK_F32;
    uint16_t *x16 = halves(x, tokens * m->columns, !wide), *left16 = halves(left, rank * m->rows, !wide);
    uint16_t *right16 = halves(right, rank * m->columns, !wide);
    void *y = malloc((size_t)(tokens * m->rows * size));
    float *inner = malloc((size_t)(tokens * rank) * 4 + 1);
    float *workspace = malloc((size_t)ck_linear_floats(m, tokens, type, threads) * 4);
    ck_linear(m, wide ? (void *)x : x16, y, tokens, type, wide ? (void *)left : left16, wide ? (void *)right : right16,
              rank, inner, workspace, threads);
    double worst = 0; /* over what float32 sums and a rounding to the type may lose */
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t o = 0; o < m->rows; o++) {
            int64_t at = t * m->rows + o;
            double sum = 0, found = wide ? ((float *)y)[at] : ck_from_bf16(((uint16_t *)y)[at]);
            for (int64_t i = 0; i < m->columns; i++) {
                double weight = weights[o * m->columns + i];
                for (int64_t r = 0; r < rank; r++) weight += left[r * m->rows + o] * right[r * m->columns + i];
                sum += x[t * m->columns + i] * weight;
            }
            worst = fmax(worst, fabs(found - sum) / (1e-5 * (double)m->columns + (wide ? 0 : 0.004) * fabs(sum)));
        }
    expect(worst < 1, "the product", m, tokens);
    void *all[] = {x, left, right, x16, left16, right16, y, inner, workspace};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void matrix(int64_t rows, int64_t columns, int64_t block_size, int64_t group_size, int64_t bits,
                   int64_t scale_bits, int threads) {
    int64_t blocks = ck_ceil_div(columns, block_size), width = blocks * block_size;
    ck_matrix m = {.rows = rows, .columns = columns, .blocks = blocks, .block_size = block_size,
                   .group_size = group_size, .groups = ck_ceil_div(rows * blocks, group_size), .bits = bits,
                   .scale_bits = scale_bits};
    int64_t code_bytes = plain_bytes(rows * width, bits), scale_bytes = plain_bytes(rows * blocks, scale_bits);
    uint8_t *plain = bytes(code_bytes), *plain_scales = bytes(scale_bytes);
    if (scale_bits == 3) plain_scales[ck_ceil_div(rows * blocks, 4) - 1] &= 3, plain_scales[scale_bytes - 1] &= 1;
    uint32_t *codes = malloc((size_t)(ck_tiles(&m) * ck_tile_words(&m)) * 4);
    uint8_t *scales = malloc((size_t)(ck_tiles(&m) * blocks * 2 * scale_bits));
    float *table = floats(1 << bits), *steps = floats(m.groups), *offset = floats(1);
    ck_pack(plain, plain_scales, codes, scales, rows, blocks, block_size, (int)bits, (int)scale_bits, threads);
    m.codes = codes, m.scale_codes = scales, m.table = table, m.steps = steps, m.offset = offset;

    uint8_t *back = malloc((size_t)code_bytes), *back_scales = calloc(1, (size_t)scale_bytes);
    ck_unpack(back, back_scales, codes, scales, rows, blocks, block_size, (int)bits, (int)scale_bits, threads);
    expect(!memcmp(back, plain, (size_t)code_bytes), "the way back", &m, 0);
    int same = 1;
    for (int64_t i = 0; i < rows * blocks; i++)
        same &= ck_plain_code(back_scales, (int)scale_bits, rows * blocks, i) ==
                ck_plain_code(plain_scales, (int)scale_bits, rows * blocks, i);
    expect(same, "the way back of the scales", &m, 0);

    float *weights = malloc((size_t)(rows * columns) * 4), *found = malloc((size_t)(rows * columns) * 4);
    double *exact = malloc((size_t)(rows * columns) * 8), *paired = malloc((size_t)(rows * columns) * 8);
    for (int64_t o = 0; o < rows; o++)
        for (int64_t i = 0; i < columns; i++) {
            int64_t block = o * blocks + i / block_size;
            float above = (float)ck_plain_code(plain_scales, (int)scale_bits, rows * blocks, block) *
                          steps[block / group_size];
            unsigned code = ck_plain_code(plain, (int)bits, rows * width, o * width + i);
            weights[o * columns + i] = table[code] * (above + offset[0]);
            exact[o * columns + i] = weights[o * columns + i];
            paired[o * columns + i] = (double)ck_from_bf16(ck_to_bf16(table[code])) * (above + offset[0]);
        }
    ck_dequantize(&m, 0, rows, 0, columns, found, CK_F32, threads);
    expect(!memcmp(found, weights, (size_t)(rows * columns) * 4), "the weights", &m, 0);
    uint16_t *half = malloc((size_t)columns * 2);
    for (int64_t type = CK_BF16; type <= CK_F16; type++) {
        ck_dequantize(&m, rows - 1, rows, 0, columns, half, type, 1);
        if (columns > 32) ck_dequantize(&m, rows - 1, rows, 32, columns, half + 32, type, 1);
    }

    int64_t tokens[] = {1, 2, 3, 4, 5, 8, 9, 16, 13, 7, 38, 17, 3, 38};
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
        int64_t type = i % 2 ? CK_BF16 : CK_F32;
        product(&m, rounds_entries(type) ? paired : exact, tokens[i], type, i % 3 ? 3 : 0, threads);
    }
    void *all[] = {plain, plain_scales, codes, scales, table, steps, offset, back, back_scales, weights, found, half,
                   exact, paired};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

int main(void) {
    int64_t widths[] = {2, 3, 4, 8};
    for (int level = 0; level <= ck_best_level(); level++) {
        ck_set_level(level);
        for (int i = 0; i < 16; i++) {
            int64_t bits = widths[i % 4], scale_bits = widths[i / 4];
            matrix(1, 5, 8, 1, bits, scale_bits, 1);
            matrix(33, 75, 24, 3, bits, scale_bits, 2);
            matrix(16, 64, 32, 256, bits, scale_bits, 1);
        }
        matrix(150, 520, 64, 16, 3, 8, 2); /* enough work for two threads, and columns for three panels */
    }
    printf("%d wrong\n", wrong);
    return wrong != 0;
}
