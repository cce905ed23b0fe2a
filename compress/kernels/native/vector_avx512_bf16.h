/* Pairs of bfloat16, two columns in a word of 32 bits. */
#ifndef CK_VECTOR_BF16_H
#define CK_VECTOR_BF16_H

#define BF16_PAIRS

#ifdef CK_EMULATE_BF16
static inline __m512i round_both(v16 low, v16 high) {
    __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(low), 16));
    __m256i b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(high), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}
#else
static inline __m512i round_both(v16 low, v16 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
#endif

/* Both rounded to bfloat16: a in the lower half of each word, b in the upper one. */
static inline v16 v_pair(v16 a, v16 b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, round_both(a, b)));
}

typedef __m512i pair_table; /* of 2, 3 or 4 bits, 32 entries; shorter tables repeat */

static inline pair_table pair_table_load(const float *table, int bits) {
    v16 once = table_load(table, bits);
    return round_both(once, once);
}

/* The entries at the low bits of both halves of each word. */
static inline v16 look_up_pairs(pair_table table, w16 index) {
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, table));
}

/* The first `count` (at most 32) halves at p, zeros after them. */
static inline v16 read_pairs(const uint16_t *p, int count) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p));
}

/* Eight halves to four words: i and i + 4 share one. */
static inline void pair_halves(float *to, const void *from) {
    __m128i x = _mm_loadu_si128((const __m128i *)from);
    _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi16(x, _mm_unpackhi_epi64(x, x)));
}

/* The two products of each word added to the sum. */
static inline v16 v_dot_pairs(v16 a, v16 b, v16 sum) {
#ifdef CK_EMULATE_BF16
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
    __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
    v16 high = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(x, upper)),
                             _mm512_castsi512_ps(_mm512_and_si512(y, upper)));
    v16 low = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                            _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)));
    return _mm512_add_ps(_mm512_add_ps(sum, high), low);
#else
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
#endif
}

#endif
