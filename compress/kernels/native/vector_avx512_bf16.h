/* Pairs of bfloat16, two columns in a word of 32 bits: the panels' weights and inputs where there are instructions. */
#ifndef CK_VECTOR_BF16_H
#define CK_VECTOR_BF16_H

#define BF16_PAIRS 1
#define MOST_DIRECT_BF16 4 /* from 5 tokens on, two multiplications at once outweigh the rounding of weights */

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
