/* Products with a packed matrix and its weights: the library's operations, on the level in force. */
#include "kernels.h"

static const ck_kernels *kernels(void) {
    switch (ck_level()) {
#if CK_HAS_BF16
        case CK_AVX512_BF16: return &ck_kernels_avx512_bf16;
#endif
#if CK_X86
        case CK_AVX512: return &ck_kernels_avx512;
        case CK_AVX2: return &ck_kernels_avx2;
#endif
        default: return &ck_kernels_scalar;
    }
}

typedef struct {
    const ck_kernels *kernels;
    ck_product *product;
    float *x, *inner;
} product_call;

static void widen_tokens(void *argument, int64_t begin, int64_t end) {
    const product_call *call = argument;
    call->kernels->widen(call->product, call->x, begin, end);
}

static void inner_ranks(void *argument, int64_t begin, int64_t end) {
    const product_call *call = argument;
    call->kernels->inner(call->product, call->inner, begin, end);
}

static void direct_tiles(void *argument, int64_t begin, int64_t end) {
    const product_call *call = argument;
    call->kernels->direct(call->product, begin, end);
}

static void panel_groups(void *argument, int64_t begin, int64_t end) {
    const product_call *call = argument;
    ck_product *p = call->product;
    int64_t slot = __atomic_fetch_add(&p->next_slot, 1, __ATOMIC_RELAXED);
    call->kernels->panel(p, p->workspace + slot * ck_panel_floats(p->tokens, p->tiles_at_once), begin, end);
}

/* Floats that hold x as `widen` leaves it. */
static int64_t widened_floats(const ck_matrix *m, int64_t tokens, int64_t type) {
    return tokens * m->blocks * m->block_size / (type == CK_BF16 && kernels()->pairs ? 2 : 1);
}

static int64_t most_tiles_at_once(int64_t tokens) { return tokens > 32 ? 8 : 4; }

/* As many that threads get about equally many groups of them; even, as panels hold two. */
static int64_t tiles_at_once(const ck_matrix *m, int64_t tokens, int64_t threads) {
    int64_t tiles = ck_ceil_div(ck_tiles(m), threads), groups = ck_ceil_div(tiles, most_tiles_at_once(tokens));
    return ck_ceil_div(ck_ceil_div(tiles, groups), 2) * 2;
}

/* Floats of workspace for ck_linear. */
CK_EXPORT int64_t ck_linear_floats(const ck_matrix *m, int64_t tokens, int64_t type, int64_t threads) {
    int direct = kernels()->is_direct(m, tokens, type);
    int64_t panels = direct ? 0 : threads * ck_panel_floats(tokens, most_tiles_at_once(tokens));
    return widened_floats(m, tokens, type) + panels;
}

/* y [tokens, rows] = x [tokens, columns] (Q + left^T right)^T, all dense ones of `type`, sums in float32.
 * inner [tokens, rank] becomes x times right transposed. */
CK_EXPORT void ck_linear(const ck_matrix *m, const void *x, void *y, int64_t tokens, int64_t type, const void *left,
                         const void *right, int64_t rank, float *inner, float *workspace, int64_t threads) {
    const ck_kernels *k = kernels();
    int64_t width = m->blocks * m->block_size;
    ck_factors factors = {.left = left, .right = right, .rank = rank};
    ck_product p = {.matrix = m, .raw = x, .x = x, .tokens = tokens, .y = y, .type = type,
                    .factors = rank ? &factors : NULL};
    product_call call = {.kernels = k, .product = &p};
    if (type != CK_F32 || width != m->columns || tokens > 1) { /* one token of float32 lies as it must */
        p.x = call.x = workspace;
        workspace += widened_floats(m, tokens, type);
        ck_parallel(tokens, 1, tokens * width < 1 << 16 ? 1 : (int)threads, widen_tokens, &call);
    }
    if (rank) {
        p.inner = call.inner = inner;
        ck_parallel(rank, 1, rank * width * tokens < 1 << 16 ? 1 : (int)threads, inner_ranks, &call);
    }
    if (m->rows * width * tokens < 1 << 17) threads = 1; /* less work than waking a thread */
    if (k->is_direct(m, tokens, type)) {
        ck_parallel(ck_tiles(m), 1, (int)threads, direct_tiles, &call);
        return;
    }
    p.workspace = workspace;
    p.tiles_at_once = tiles_at_once(m, tokens, threads);
    ck_parallel(ck_ceil_div(ck_tiles(m), p.tiles_at_once), 1, (int)threads, panel_groups, &call);
}

typedef struct {
    const ck_kernels *kernels;
    const ck_matrix *matrix;
    ck_part part;
    void *out;
    int type;
} dequantize_call;

static void dequantize_tiles(void *argument, int64_t begin, int64_t end) {
    const dequantize_call *call = argument;
    int64_t skipped = call->part.first_row / CK_TILE;
    call->kernels->dequantize(call->matrix, begin + skipped, end + skipped, &call->part, call->out, call->type);
}

/* Weights of a part, [rows, columns] of `type`: table entry times scale, rounded once. */
CK_EXPORT void ck_dequantize(const ck_matrix *m, int64_t first_row, int64_t last_row, int64_t first_column,
                             int64_t last_column, void *out, int64_t type, int64_t threads) {
    dequantize_call call = {.kernels = kernels(), .matrix = m, .out = out, .type = (int)type,
                            .part = {first_row, last_row, first_column, last_column}};
    int64_t tiles = ck_ceil_div(last_row, CK_TILE) - first_row / CK_TILE;
    if (tiles * CK_TILE * (last_column - first_column) < 1 << 15) threads = 1;
    ck_parallel(tiles, 1, (int)threads, dequantize_tiles, &call);
}

/* Rounds of 192 (384 of bfloat16 where pairs of it are multiplied) multiplications and additions in registers on one
 * thread; the sum keeps them from being left out. */
CK_EXPORT float ck_peak(int64_t rounds, int64_t type) { return kernels()->peak(rounds, type); }
