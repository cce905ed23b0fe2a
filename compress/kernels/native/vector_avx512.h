/* Sixteen floats or words as one register of AVX-512. */
#ifndef CK_VECTOR_H
#define CK_VECTOR_H

#ifndef SPECIALIZED
#define SPECIALIZED 1
#endif
#define MOST_DIRECT 8
#define PANEL_TILES 2 /* tiles that the micro-kernel multiplies at a time */
#define PANEL_TOKENS 12
#define PAIR_TILES 4 /* there is a kernel for pairs of 2-bit codes; so many tiles share its look-ups */

#define UNROLL _Pragma("GCC unroll 16")

typedef __m512 v16;
typedef __m512i w16;
typedef __m512 small_table; /* 2, 3 or 4 bits; shorter tables repeat */

static inline v16 v_zero(void) { return _mm512_setzero_ps(); }
static inline v16 v_set(float x) { return _mm512_set1_ps(x); }
static inline v16 v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, v16 x) { _mm512_storeu_ps(p, x); }
static inline v16 v_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
static inline v16 v_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
static inline v16 v_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
static inline float v_sum(v16 a) { return _mm512_reduce_add_ps(a); }

static inline w16 w_load(const uint32_t *p) { return _mm512_loadu_si512(p); }
static inline w16 w_left(w16 a, int bits) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits)); }
static inline w16 w_right(w16 a, int bits) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits)); }

/* Bits of b where the mask is set, bits of a elsewhere. */
static inline w16 w_select(uint32_t mask, w16 a, w16 b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32((int)mask), b, a, 0xca);
}

static inline small_table table_load(const float *table, int bits) {
    __m512i place = _mm512_and_si512(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                     _mm512_set1_epi32((1 << bits) - 1));
    return _mm512_i32gather_ps(place, table, 4);
}

/* The entries at the low four bits of each word, or fewer as the table repeats. */
static inline v16 look_up(small_table table, w16 index) { return _mm512_permutexvar_ps(index, table); }

static inline v16 look_up_8(small_table table, w16 index) { return look_up(table, index); }

/* Among 256 entries: eight look-ups among 32, of which bits 5 to 7 choose. Gathers are slower wherever they had to be
 * slowed down for safety. */
static inline v16 look_up_bytes(const float *table, w16 index) {
    __mmask16 bit5 = _mm512_movepi32_mask(_mm512_slli_epi32(index, 26));
    __mmask16 bit6 = _mm512_movepi32_mask(_mm512_slli_epi32(index, 25));
    __mmask16 bit7 = _mm512_movepi32_mask(_mm512_slli_epi32(index, 24));
    __m512 part[8];
    UNROLL
    for (int i = 0; i < 8; i++)
        part[i] = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32 * i), index, _mm512_loadu_ps(table + 32 * i + 16));
    UNROLL
    for (int i = 0; i < 4; i++) part[i] = _mm512_mask_blend_ps(bit5, part[2 * i], part[2 * i + 1]);
    part[0] = _mm512_mask_blend_ps(bit6, part[0], part[1]);
    part[2] = _mm512_mask_blend_ps(bit6, part[2], part[3]);
    return _mm512_mask_blend_ps(bit7, part[0], part[2]);
}

/* The scale codes of a block of a tile as floats. */
static inline v16 scale_codes(const uint8_t *p, int bits) {
    uint64_t eight;
    uint32_t four;
    __m512i code;
    switch (bits) {
        case 8: code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); break;
        case 4:
            memcpy(&eight, p, 8);
            code = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
                                            _mm512_castsi128_si512(_mm_cvtsi64_si128((long long)eight)));
            code = _mm512_srlv_epi32(code, _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
            code = _mm512_and_si512(code, _mm512_set1_epi32(15));
            break;
        default:
            memcpy(&four, p, 4);
            code = _mm512_srlv_epi32(_mm512_set1_epi32((int)four),
                                     _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
            code = _mm512_and_si512(code, _mm512_set1_epi32(3));
            if (bits == 3)
                code = _mm512_mask_or_epi32(code, (__mmask16)(p[4] | p[5] << 8), code, _mm512_set1_epi32(4));
    }
    return _mm512_cvtepi32_ps(code);
}

/* Each lane's place among the groups of scales: blocks of its group that lie behind it, and the group. */
typedef struct { __m512i rest, group; } places;

static inline places places_load(const int32_t *rest, const int32_t *group) {
    places found = {_mm512_loadu_si512(rest), _mm512_loadu_si512(group)};
    return found;
}

/* Blocks until the first lane enters another group. */
static inline int32_t places_left(const places *at, int32_t size) { return size - _mm512_reduce_max_epi32(at->rest); }

/* As many blocks on. */
static inline void places_step(places *at, int32_t count, int32_t size) {
    at->rest = _mm512_add_epi32(at->rest, _mm512_set1_epi32(count));
    __mmask16 over = _mm512_cmpeq_epi32_mask(at->rest, _mm512_set1_epi32(size));
    at->rest = _mm512_maskz_mov_epi32((__mmask16)~over, at->rest);
    at->group = _mm512_mask_add_epi32(at->group, over, at->group, _mm512_set1_epi32(1));
}

/* The groups' steps; places after the last group, where padded rows are, take the last one's. */
static inline v16 places_steps(const places *at, const float *steps, int32_t groups) {
    return _mm512_i32gather_ps(_mm512_min_epi32(at->group, _mm512_set1_epi32(groups - 1)), steps, 4);
}

/* a[i] becomes the i-th elements of all. */
static inline void v_transpose(v16 a[16]) {
    __m512 b[16];
    UNROLL
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 16; i += 4) {
        __m512d p = _mm512_castps_pd(b[i]), q = _mm512_castps_pd(b[i + 1]);
        __m512d r = _mm512_castps_pd(b[i + 2]), s = _mm512_castps_pd(b[i + 3]);
        a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, r));
        a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, r));
        a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(q, s));
        a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(q, s));
    }
    UNROLL
    for (int i = 0; i < 4; i++) { /* b[i + 4 j]: quarters of rows 4 j to 4 j + 3 */
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
        a[i + 4] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd);
    }
}

/* Rounded to nearest, ties to even, in the upper half of each word; a NaN stays one. */
static inline __m512i round_bf16(v16 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

/* Words of two 16-bit floats, a in the lower half. */
static inline v16 v_halves(v16 a, v16 b, int type) {
    if (type == CK_F16) {
        __m512i low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        __m512i high = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    __m512i low = _mm512_srli_epi32(round_bf16(a), 16);
    return _mm512_castsi512_ps(w_select(0xffff0000u, low, round_bf16(b)));
}

/* The first `count` (at most 16) elements of 16-bit or 32-bit floats at p; zeros after them. */
static inline v16 v_read(const void *p, int type, int count) {
    __mmask16 mask = (__mmask16)((1u << count) - 1);
    if (type == CK_F32) return _mm512_maskz_loadu_ps(mask, p);
    __m256i half = _mm256_maskz_loadu_epi16(mask, p);
    if (type == CK_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline void v_write(void *p, int type, int count, v16 x) {
    __mmask16 mask = (__mmask16)((1u << count) - 1);
    if (type == CK_F32) {
        _mm512_mask_storeu_ps(p, mask, x);
        return;
    }
    if (type == CK_F16) {
        _mm256_mask_storeu_epi16(p, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        return;
    }
    _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(x), 16)));
}

#endif
