/* Sixteen floats or words as two registers of AVX2. */
#ifndef CK_VECTOR_H
#define CK_VECTOR_H

#define UNROLL _Pragma("GCC unroll 16")
#ifndef SPECIALIZED
#define SPECIALIZED 1
#endif
#define MOST_DIRECT 4
#define PANEL_TILES 1
#define PANEL_TOKENS 6

typedef struct { __m256 a, b; } v16;
typedef struct { __m256i a, b; } w16;
typedef struct { __m256 low, high; } small_table; /* entries 0 to 7 and 8 to 15; shorter tables repeat */

static inline v16 v_set(float x) { return (v16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline v16 v_zero(void) { return (v16){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline v16 v_load(const float *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

static inline void v_store(float *p, v16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}

static inline v16 v_add(v16 x, v16 y) { return (v16){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline v16 v_mul(v16 x, v16 y) { return (v16){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }

static inline v16 v_fma(v16 x, v16 y, v16 z) {
    return (v16){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}

static inline float v_sum(v16 x) {
    __m256 both = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

static inline w16 w_load(const uint32_t *p) {
    return (w16){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8))};
}

static inline w16 w_left(w16 x, int bits) {
    __m128i count = _mm_cvtsi32_si128(bits);
    return (w16){_mm256_sll_epi32(x.a, count), _mm256_sll_epi32(x.b, count)};
}

static inline w16 w_right(w16 x, int bits) {
    __m128i count = _mm_cvtsi32_si128(bits);
    return (w16){_mm256_srl_epi32(x.a, count), _mm256_srl_epi32(x.b, count)};
}

/* Bits of y where the mask is set, bits of x elsewhere. */
static inline w16 w_select(uint32_t mask, w16 x, w16 y) {
    __m256i m = _mm256_set1_epi32((int)mask);
    return (w16){_mm256_or_si256(_mm256_andnot_si256(m, x.a), _mm256_and_si256(m, y.a)),
                 _mm256_or_si256(_mm256_andnot_si256(m, x.b), _mm256_and_si256(m, y.b))};
}

static inline small_table table_load(const float *table, int bits) {
    float all[16];
    for (int i = 0; i < 16; i++) all[i] = table[i & ((1 << bits) - 1)];
    return (small_table){_mm256_loadu_ps(all), _mm256_loadu_ps(all + 8)};
}

static inline __m256 look_up_half(small_table table, __m256i index) {
    __m256 low = _mm256_permutevar8x32_ps(table.low, index);
    __m256 high = _mm256_permutevar8x32_ps(table.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28))); /* by bit 3 */
}

static inline v16 look_up(small_table table, w16 index) {
    return (v16){look_up_half(table, index.a), look_up_half(table, index.b)};
}

/* The same for a table of at most 8 entries. */
static inline v16 look_up_8(small_table table, w16 index) {
    return (v16){_mm256_permutevar8x32_ps(table.low, index.a), _mm256_permutevar8x32_ps(table.low, index.b)};
}

static inline v16 look_up_bytes(const float *table, w16 index) {
    __m256i byte = _mm256_set1_epi32(255);
    return (v16){_mm256_i32gather_ps(table, _mm256_and_si256(index.a, byte), 4),
                 _mm256_i32gather_ps(table, _mm256_and_si256(index.b, byte), 4)};
}

static inline v16 floats_of(__m256i a, __m256i b) { return (v16){_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)}; }

/* 4 in every lane whose bit is set. */
static inline __m256i four_where(__m256i bits, __m256i bit) {
    return _mm256_and_si256(_mm256_cmpeq_epi32(_mm256_and_si256(bits, bit), bit), _mm256_set1_epi32(4));
}

/* The scale codes of a block of a tile as floats. */
static inline v16 scale_codes(const uint8_t *p, int bits) {
    __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14), a, b, bit;
    uint32_t words[2];
    switch (bits) {
        case 8:
            return floats_of(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)),
                             _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))));
        case 4:
            memcpy(words, p, 8);
            a = _mm256_srlv_epi32(_mm256_set1_epi32((int)words[0]), _mm256_add_epi32(even, even));
            b = _mm256_srlv_epi32(_mm256_set1_epi32((int)words[1]), _mm256_add_epi32(even, even));
            return floats_of(_mm256_and_si256(a, _mm256_set1_epi32(15)), _mm256_and_si256(b, _mm256_set1_epi32(15)));
        default:
            memcpy(words, p, 4);
            a = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)words[0]), even), _mm256_set1_epi32(3));
            b = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)(words[0] >> 16)), even),
                                 _mm256_set1_epi32(3));
            if (bits == 2) return floats_of(a, b);
            bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128); /* lane l is bit l of the high plane */
            a = _mm256_or_si256(a, four_where(_mm256_set1_epi32(p[4]), bit));
            b = _mm256_or_si256(b, four_where(_mm256_set1_epi32(p[5]), bit));
            return floats_of(a, b);
    }
}

/* Each lane's place among the groups of scales: step one block on, and say whether a lane entered a group. */
typedef struct { __m256i rest[2], group[2]; } places;

static inline places places_load(const int32_t *rest, const int32_t *group) {
    places r;
    for (int i = 0; i < 2; i++) {
        r.rest[i] = _mm256_loadu_si256((const __m256i *)(rest + 8 * i));
        r.group[i] = _mm256_loadu_si256((const __m256i *)(group + 8 * i));
    }
    return r;
}

static inline int32_t places_left(const places *at, int32_t size) {
    __m256i most = _mm256_max_epi32(at->rest[0], at->rest[1]);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return size - _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

static inline void places_step(places *at, int32_t count, int32_t size) {
    for (int i = 0; i < 2; i++) {
        at->rest[i] = _mm256_add_epi32(at->rest[i], _mm256_set1_epi32(count));
        __m256i over = _mm256_cmpeq_epi32(at->rest[i], _mm256_set1_epi32(size));
        at->rest[i] = _mm256_andnot_si256(over, at->rest[i]);
        at->group[i] = _mm256_sub_epi32(at->group[i], over);
    }
}

static inline v16 places_steps(const places *at, const float *steps, int32_t groups) {
    __m256i last = _mm256_set1_epi32(groups - 1);
    return (v16){_mm256_i32gather_ps(steps, _mm256_min_epi32(at->group[0], last), 4),
                 _mm256_i32gather_ps(steps, _mm256_min_epi32(at->group[1], last), 4)};
}

static inline void transpose_8(__m256 *a[8]) {
    __m256 b[8], c[8];
    UNROLL
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(*a[i], *a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(*a[i], *a[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 8; i += 4) {
        c[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        c[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        c[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        c[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        *a[i] = _mm256_permute2f128_ps(c[i], c[i + 4], 0x20);
        *a[i + 4] = _mm256_permute2f128_ps(c[i], c[i + 4], 0x31);
    }
}

/* a[i] becomes the i-th elements of all. */
static inline void v_transpose(v16 a[16]) {
    __m256 *square[8];
    UNROLL
    for (int part = 0; part < 4; part++) {
        UNROLL
        for (int i = 0; i < 8; i++) {
            v16 *row = &a[i + 8 * (part / 2)];
            square[i] = part % 2 ? &row->b : &row->a;
        }
        transpose_8(square);
    }
    UNROLL
    for (int i = 0; i < 8; i++) {
        __m256 kept = a[i].b;
        a[i].b = a[i + 8].a;
        a[i + 8].a = kept;
    }
}

static inline __m256 read_8(const void *p, int type) {
    if (type == CK_F32) return _mm256_loadu_ps(p);
    __m128i half = _mm_loadu_si128(p);
    if (type == CK_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* The first `count` (at most 16) elements of 16-bit or 32-bit floats at p; zeros after them. */
static inline v16 v_read(const void *p, int type, int count) {
    int64_t size = type == CK_F32 ? 4 : 2;
    char all[64] = {0};
    if (count < 16) p = memcpy(all, p, (size_t)(count * size));
    return (v16){read_8(p, type), read_8((const char *)p + 8 * size, type)};
}

/* Rounded to nearest, ties to even, in the upper half of each word; a NaN stays one. */
static inline __m256i round_bf16(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan);
}

static inline __m256 halves_8(__m256 a, __m256 b, int type) {
    __m256i low, high;
    if (type == CK_F16) {
        low = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        high = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        high = _mm256_slli_epi32(high, 16);
    } else {
        low = _mm256_srli_epi32(round_bf16(a), 16);
        high = _mm256_and_si256(round_bf16(b), _mm256_set1_epi32((int)0xffff0000u));
    }
    return _mm256_castsi256_ps(_mm256_or_si256(low, high));
}

/* Words of two 16-bit floats, x in the lower half. */
static inline v16 v_halves(v16 x, v16 y, int type) {
    return (v16){halves_8(x.a, y.a, type), halves_8(x.b, y.b, type)};
}

static inline void write_8(void *p, int type, __m256 x) {
    if (type == CK_F32) {
        _mm256_storeu_ps(p, x);
        return;
    }
    if (type == CK_F16) {
        _mm_storeu_si128(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        return;
    }
    __m256i up = _mm256_srli_epi32(round_bf16(x), 16);
    up = _mm256_packus_epi32(up, up);
    up = _mm256_permute4x64_epi64(up, 0x08);
    _mm_storeu_si128(p, _mm256_castsi256_si128(up));
}

static inline void v_write(void *p, int type, int count, v16 x) {
    int64_t size = type == CK_F32 ? 4 : 2;
    char all[64];
    char *to = count < 16 ? all : p;
    write_8(to, type, x.a);
    write_8(to + 8 * size, type, x.b);
    if (count < 16) memcpy(p, all, (size_t)(count * size));
}

#endif
