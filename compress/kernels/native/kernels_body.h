/* The kernels over vectors of 16 rows, written once; kernels_LEVEL.c includes this after vector_LEVEL.h. */
#include "kernels_dequantize.h"
#include "kernels_panel.h"

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

/* Tokens begin to end of x into the order of the panels, four pairs an octet. */
static void widen_pairs(const ck_product *p, float *to, int64_t begin, int64_t end) {
    int64_t width = p->matrix->blocks * p->matrix->block_size, columns = p->matrix->columns;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = t / PANEL_TOKENS * PANEL_TOKENS, together = ck_min(PANEL_TOKENS, p->tokens - first);
        float *place = to + first * width / 2 + (t - first) * 4;
        const char *from = (const char *)p->raw + t * columns * 2;
        for (int64_t k = 0; k < width; k += 8, place += 4 * together) {
            int64_t count = columns - k < 0 ? 0 : ck_min(8, columns - k);
            memset(place, 0, 16);
            memcpy(place, from + k * 2, (size_t)count * 2);
        }
    }
}

/* Tokens begin to end of x as float32 (or as pairs) into the order of the product's kernel. */
static void widen(const ck_product *p, float *to, int64_t begin, int64_t end) {
    if (by_pairs(p) && p->tokens > MOST_DIRECT_BF16) {
        widen_pairs(p, to, begin, end);
        return;
    }
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
