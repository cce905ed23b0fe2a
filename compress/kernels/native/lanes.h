/* Vectors of float32 lanes at the level of the file that includes this, and look-up tables on them.
 *
 * Every operation is done lane by lane and rounded once, so vectors of other widths give the same bits. That holds for
 * `multiply_add` too where there is one instruction for it (AVX2 and AVX-512); the scalar level rounds the product first.
 */
#ifndef CK_LANES_H
#define CK_LANES_H

#include <math.h>

#include "levels.h"

/* Before a short loop whose variables are to stay in registers. */
#define EACH_OF_16 _Pragma("GCC unroll 16")

#if CK_X86 && CK_FILE_LEVEL == 2

#define LANES 16
typedef __m512 lanes;
typedef __m512i codes_of_lanes;

static inline lanes load(const float *from) { return _mm512_loadu_ps(from); }
static inline void store(float *to, lanes a) { _mm512_storeu_ps(to, a); }
static inline lanes every(float a) { return _mm512_set1_ps(a); }
static inline lanes multiply_add(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
static inline lanes larger(lanes a, lanes b) { return _mm512_max_ps(a, b); }
static inline lanes absolute(lanes a) { return _mm512_abs_ps(a); }
/* b where a > limit, else c */
static inline lanes where_above(lanes a, lanes limit, lanes b, lanes c) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, limit, _CMP_GT_OQ), c, b);
}
static inline codes_of_lanes no_codes(void) { return _mm512_setzero_si512(); }
/* codes + step where a > limit */
static inline codes_of_lanes step_where_above(codes_of_lanes codes, lanes a, lanes limit, int step) {
    return _mm512_mask_add_epi32(codes, _mm512_cmp_ps_mask(a, limit, _CMP_GT_OQ), codes, _mm512_set1_epi32(step));
}
static inline lanes look_up(const float *table, codes_of_lanes codes) { return _mm512_i32gather_ps(codes, table, 4); }
/* From a table of 16 entries at most that lies in a vector. */
static inline lanes look_up_small(lanes table, const float *entries, codes_of_lanes codes) {
    (void)entries;
    return _mm512_permutexvar_ps(codes, table);
}
static inline void store_codes(uint8_t *to, codes_of_lanes codes) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(codes));
}
static inline codes_of_lanes load_codes(const uint8_t *from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
}
static inline codes_of_lanes plus(codes_of_lanes codes, int step) {
    return _mm512_add_epi32(codes, _mm512_set1_epi32(step));
}
static inline codes_of_lanes truncated(lanes a) { return _mm512_cvttps_epi32(a); }
static inline codes_of_lanes look_up_code(const int32_t *table, codes_of_lanes at) {
    return _mm512_i32gather_epi32(at, table, 4);
}
static inline codes_of_lanes bits_of(lanes a) { return _mm512_castps_si512(a); }
static inline codes_of_lanes larger_code(codes_of_lanes a, codes_of_lanes b) { return _mm512_max_epi32(a, b); }

#elif CK_X86 && CK_FILE_LEVEL == 1

#define LANES 8
typedef __m256 lanes;
typedef __m256i codes_of_lanes;

static inline lanes load(const float *from) { return _mm256_loadu_ps(from); }
static inline void store(float *to, lanes a) { _mm256_storeu_ps(to, a); }
static inline lanes every(float a) { return _mm256_set1_ps(a); }
static inline lanes multiply_add(lanes a, lanes b, lanes c) { return _mm256_fmadd_ps(a, b, c); }
static inline lanes larger(lanes a, lanes b) { return _mm256_max_ps(a, b); }
static inline lanes absolute(lanes a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline lanes where_above(lanes a, lanes limit, lanes b, lanes c) {
    return _mm256_blendv_ps(c, b, _mm256_cmp_ps(a, limit, _CMP_GT_OQ));
}
static inline codes_of_lanes no_codes(void) { return _mm256_setzero_si256(); }
static inline codes_of_lanes step_where_above(codes_of_lanes codes, lanes a, lanes limit, int step) {
    __m256i mask = _mm256_castps_si256(_mm256_cmp_ps(a, limit, _CMP_GT_OQ));
    return _mm256_add_epi32(codes, _mm256_and_si256(mask, _mm256_set1_epi32(step)));
}
static inline lanes look_up(const float *table, codes_of_lanes codes) { return _mm256_i32gather_ps(table, codes, 4); }
static inline lanes look_up_small(lanes table, const float *entries, codes_of_lanes codes) {
    lanes low = _mm256_permutevar8x32_ps(table, codes), high = _mm256_permutevar8x32_ps(load(entries + 8), codes);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
static inline void store_codes(uint8_t *to, codes_of_lanes codes) {
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(words, words));
}
static inline codes_of_lanes load_codes(const uint8_t *from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
}
static inline codes_of_lanes plus(codes_of_lanes codes, int step) {
    return _mm256_add_epi32(codes, _mm256_set1_epi32(step));
}
static inline codes_of_lanes truncated(lanes a) { return _mm256_cvttps_epi32(a); }
static inline codes_of_lanes look_up_code(const int32_t *table, codes_of_lanes at) {
    return _mm256_i32gather_epi32(table, at, 4);
}
static inline codes_of_lanes bits_of(lanes a) { return _mm256_castps_si256(a); }
static inline codes_of_lanes larger_code(codes_of_lanes a, codes_of_lanes b) { return _mm256_max_epi32(a, b); }

#else /* Vectors of 4 that every processor of today has, by the compiler's own means. */

#define LANES 4
typedef float lanes __attribute__((vector_size(16)));
typedef int32_t codes_of_lanes __attribute__((vector_size(16)));

static inline lanes load(const float *from) {
    lanes a;
    memcpy(&a, from, sizeof a);
    return a;
}
static inline void store(float *to, lanes a) { memcpy(to, &a, sizeof a); }
static inline lanes every(float a) { return (lanes){a, a, a, a}; }
static inline lanes multiply_add(lanes a, lanes b, lanes c) { return a * b + c; }
static inline lanes where(codes_of_lanes mask, lanes b, lanes c) {
    return (lanes)((mask & (codes_of_lanes)b) | (~mask & (codes_of_lanes)c));
}
static inline lanes where_above(lanes a, lanes limit, lanes b, lanes c) { return where(a > limit, b, c); }
static inline lanes larger(lanes a, lanes b) { return where(a > b, a, b); }
static inline lanes absolute(lanes a) { return (lanes)((codes_of_lanes)a & 0x7fffffff); }
static inline codes_of_lanes no_codes(void) { return (codes_of_lanes){0, 0, 0, 0}; }
static inline codes_of_lanes step_where_above(codes_of_lanes codes, lanes a, lanes limit, int step) {
    return codes + ((a > limit) & step);
}
static inline lanes look_up(const float *table, codes_of_lanes codes) {
    return (lanes){table[codes[0]], table[codes[1]], table[codes[2]], table[codes[3]]};
}
static inline lanes look_up_small(lanes table, const float *entries, codes_of_lanes codes) {
    (void)table;
    return look_up(entries, codes);
}
static inline void store_codes(uint8_t *to, codes_of_lanes codes) {
    for (int lane = 0; lane < LANES; lane++) to[lane] = (uint8_t)codes[lane];
}
static inline codes_of_lanes load_codes(const uint8_t *from) {
    return (codes_of_lanes){from[0], from[1], from[2], from[3]};
}
static inline codes_of_lanes plus(codes_of_lanes codes, int step) { return codes + step; }
static inline codes_of_lanes truncated(lanes a) {
    return (codes_of_lanes){(int32_t)a[0], (int32_t)a[1], (int32_t)a[2], (int32_t)a[3]};
}
static inline codes_of_lanes look_up_code(const int32_t *table, codes_of_lanes at) {
    return (codes_of_lanes){table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
}
static inline codes_of_lanes bits_of(lanes a) { return (codes_of_lanes)a; }
static inline codes_of_lanes larger_code(codes_of_lanes a, codes_of_lanes b) {
    codes_of_lanes mask = a > b;
    return (mask & a) | (~mask & b);
}

#endif

static inline lanes within_one(lanes a) {
    lanes from_below = where_above(every(-1), a, every(-1), a);
    return where_above(from_below, every(1), every(1), from_below);
}

#define MOST_CELLS 1024

/* A sorted table of 2 to 256 entries within [-1, 1], and what finds the nearest one.
 *
 * Up to 16 entries: by halving, between midpoints, or by counting those below. More: [-1, 1] in equal cells with at most one midpoint in each, so
 * that a cell knows the entry below it and where the next one begins. Tables too dense for that are halved too.
 */
typedef struct {
    float entries[256];
    float middles[256]; /* infinite from the last one on */
    int64_t count, half; /* half: of the least power of 2 that is not below the count */
    int64_t cells;       /* 0: none */
    float cell_cut[MOST_CELLS + 1];
    int32_t cell_code[MOST_CELLS + 1];
} lookup;

/* Rounded, but never falling where `unit` rises: all that matters. */
static inline lanes cells_of(lanes unit, float half) { return (unit + every(1)) * every(half); }

static inline int64_t cell_of(float unit, float half) { return (int64_t)((unit + 1.0f) * half); }

static int cells_hold_one_each(const lookup *table, int64_t cells) {
    for (int64_t at = 0; at + 2 < table->count; at++)
        if (cell_of(table->middles[at], (float)cells / 2) == cell_of(table->middles[at + 1], (float)cells / 2))
            return 0;
    return 1;
}

/* Midpoints are taken in float64 and rounded once, as `make_grid` does. */
static void make_lookup(lookup *to, const float *entries, int64_t count) {
    for (int64_t at = 0; at < 256; at++) {
        to->entries[at] = entries[ck_min(at, count - 1)];
        to->middles[at] = INFINITY;
    }
    for (int64_t at = 0; at + 1 < count; at++)
        to->middles[at] = (float)(((double)entries[at] + (double)entries[at + 1]) / 2);
    to->count = count;
    for (to->half = 1; 2 * to->half < count;) to->half *= 2;
    to->cells = 0;
    if (count <= 16) return;
    for (int64_t cells = 64; !to->cells && cells <= MOST_CELLS; cells *= 2)
        if (cells_hold_one_each(to, cells)) to->cells = cells;
    for (int64_t cell = 0, code = 0; to->cells && cell <= to->cells; cell++) {
        int holds = code + 1 < count && cell_of(to->middles[code], (float)to->cells / 2) == cell;
        to->cell_code[cell] = (int32_t)code;
        to->cell_cut[cell] = holds ? to->middles[code] : INFINITY;
        code += holds;
    }
}

/* By halving; `middles` are the first of the table's where a vector has room for them. */
static inline __attribute__((always_inline)) codes_of_lanes halved(
    const lookup *table, lanes middles, lanes unit, int half, int small) {
    codes_of_lanes codes = no_codes();
    for (int step = half; step > 0; step /= 2) {
        codes_of_lanes at = plus(codes, step - 1);
        lanes limit = small ? look_up_small(middles, table->middles, at) : look_up(table->middles, at);
        codes = step_where_above(codes, unit, limit, step);
    }
    return codes;
}

/* The nearest entries, ties to the lower one: as many as there are midpoints below. */
static inline codes_of_lanes nearest(const lookup *table, lanes unit) {
#if LANES == 16
    lanes middles = load(table->middles);
    if (table->count <= 4) return halved(table, middles, unit, 2, 1);
    if (table->count <= 8) return halved(table, middles, unit, 4, 1);
    if (table->count <= 16) return halved(table, middles, unit, 8, 1);
#else
    if (table->count <= 16) { /* without such a look-up, counting is faster */
        codes_of_lanes codes = no_codes();
        for (int64_t at = 0; at + 1 < table->count; at++)
            codes = step_where_above(codes, unit, every(table->middles[at]), 1);
        return codes;
    }
#endif
    if (!table->cells) return halved(table, every(0), unit, (int)table->half, 0);
    lanes inside = within_one(unit);
    codes_of_lanes cell = truncated(cells_of(inside, (float)table->cells / 2));
    codes_of_lanes codes = look_up_code(table->cell_code, cell);
    return step_where_above(codes, inside, look_up(table->cell_cut, cell), 1);
}

/* What codes stand for; `first` holds the first entries where a vector has room for them. */
static inline lanes entries_of(const lookup *table, lanes first, codes_of_lanes codes) {
    return table->count <= 16 ? look_up_small(first, table->entries, codes) : look_up(table->entries, codes);
}

#endif
