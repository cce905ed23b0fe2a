/* The kernels over vectors of 16 rows, written once; kernels_LEVEL.c includes this after vector_LEVEL.h. */
#include "kernels_dequantize.h"
#include "kernels_panel.h"
#ifdef BF16_PAIRS
#include "kernels_pairs.h"
#endif

INLINE void inner_tokens(const ck_product *p, float *found, int64_t r, int64_t first, int tokens) {
#ifdef BF16_PAIRS
    if (p->type == CK_BF16) {
        inner_pairs(p, found, r, first, tokens);
        return;
    }
#endif
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

/* Tokens begin to end of x as float32 (or as pairs) into the order of the product's kernel. */
static void widen(const ck_product *p, float *to, int64_t begin, int64_t end) {
#ifdef BF16_PAIRS
    if (p->type == CK_BF16) {
        widen_pairs(p, to, begin, end);
        return;
    }
#endif
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

/* Multiply and add in registers, 192 of them a round, of bfloat16 as pairs: how fast the processor can be at most. */
static float peak(int64_t rounds, int64_t type) {
    v16 sums[12], factor = v_set(0.5f);
    UNROLL
    for (int i = 0; i < 12; i++) sums[i] = v_set((float)i);
#ifdef BF16_PAIRS
    for (; type == CK_BF16 && rounds > 0; rounds--) {
        UNROLL
        for (int i = 0; i < 12; i++) sums[i] = v_dot_pairs(factor, factor, sums[i]);
    }
#else
    (void)type;
#endif
    for (; rounds > 0; rounds--) {
        UNROLL
        for (int i = 0; i < 12; i++) sums[i] = v_fma(sums[i], factor, factor);
    }
    float total = 0;
    for (int i = 0; i < 12; i++) total += v_sum(sums[i]);
    return total;
}

#ifdef BF16_PAIRS
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#define direct_by_pairs direct
#define panel_by_pairs panel
#endif

static void any_direct(const ck_product *p, int64_t begin, int64_t end) {
    (p->type == CK_BF16 ? direct_by_pairs : direct)(p, begin, end);
}

static void any_panel(const ck_product *p, float *workspace, int64_t begin, int64_t end) {
    (p->type == CK_BF16 ? panel_by_pairs : panel)(p, workspace, begin, end);
}

#define CK_KERNELS {HAS_PAIRS, is_direct, any_direct, any_panel, dequantize, inner, widen, peak}
