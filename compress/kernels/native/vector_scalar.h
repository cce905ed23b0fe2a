/* Sixteen floats or words as an array: plain C for every processor. */
#ifndef CK_VECTOR_H
#define CK_VECTOR_H

#include "matrix.h"

#define UNROLL
#undef SPECIALIZED
#define SPECIALIZED 0
#define MOST_DIRECT 8
#define PANEL_TILES 1
#define PANEL_TOKENS 4

#define EACH for (int i = 0; i < 16; i++)

typedef struct { float v[16]; } v16;
typedef struct { uint32_t v[16]; } w16;
typedef v16 small_table;

static inline v16 v_set(float x) {
    v16 r;
    EACH r.v[i] = x;
    return r;
}

static inline v16 v_zero(void) { return v_set(0.0f); }

static inline v16 v_load(const float *p) {
    v16 r;
    EACH r.v[i] = p[i];
    return r;
}

static inline void v_store(float *p, v16 x) { EACH p[i] = x.v[i]; }

static inline v16 v_add(v16 a, v16 b) {
    EACH a.v[i] += b.v[i];
    return a;
}

static inline v16 v_mul(v16 a, v16 b) {
    EACH a.v[i] *= b.v[i];
    return a;
}

/* Two roundings: a fused operation without an instruction for it is far too slow. */
static inline v16 v_fma(v16 a, v16 b, v16 c) {
    EACH c.v[i] += a.v[i] * b.v[i];
    return c;
}

static inline float v_sum(v16 a) {
    float sum = 0;
    EACH sum += a.v[i];
    return sum;
}

static inline w16 w_load(const uint32_t *p) {
    w16 r;
    EACH r.v[i] = p[i];
    return r;
}

static inline w16 w_left(w16 a, int bits) {
    EACH a.v[i] <<= bits;
    return a;
}

static inline w16 w_right(w16 a, int bits) {
    EACH a.v[i] >>= bits;
    return a;
}

static inline w16 w_select(uint32_t mask, w16 a, w16 b) {
    EACH a.v[i] = (a.v[i] & ~mask) | (b.v[i] & mask);
    return a;
}

static inline small_table table_load(const float *table, int bits) {
    v16 r;
    EACH r.v[i] = table[i & ((1 << bits) - 1)];
    return r;
}

static inline v16 look_up(small_table table, w16 index) {
    v16 r;
    EACH r.v[i] = table.v[index.v[i] & 15];
    return r;
}

static inline v16 look_up_8(small_table table, w16 index) { return look_up(table, index); }

static inline v16 look_up_bytes(const float *table, w16 index) {
    v16 r;
    EACH r.v[i] = table[index.v[i] & 255];
    return r;
}

static inline v16 scale_codes(const uint8_t *p, int bits) {
    v16 r;
    EACH r.v[i] = (float)ck_plain_code(p, bits, CK_TILE, i);
    return r;
}

typedef struct { int32_t rest[16], group[16]; } places;

static inline places places_load(const int32_t *rest, const int32_t *group) {
    places r;
    EACH {
        r.rest[i] = rest[i];
        r.group[i] = group[i];
    }
    return r;
}

static inline int32_t places_left(const places *at, int32_t size) {
    int32_t most = 0;
    EACH most = at->rest[i] > most ? at->rest[i] : most;
    return size - most;
}

static inline void places_step(places *at, int32_t count, int32_t size) {
    EACH {
        int over = (at->rest[i] += count) == size;
        at->rest[i] = over ? 0 : at->rest[i];
        at->group[i] += over;
    }
}

static inline v16 places_steps(const places *at, const float *steps, int32_t groups) {
    v16 r;
    EACH r.v[i] = steps[at->group[i] < groups ? at->group[i] : groups - 1];
    return r;
}

static inline void v_transpose(v16 a[16]) {
    for (int j = 0; j < 16; j++)
        for (int i = 0; i < j; i++) {
            float kept = a[i].v[j];
            a[i].v[j] = a[j].v[i];
            a[j].v[i] = kept;
        }
}

/* Half-precision floats by integers: subnormal ones and NaN too, rounded to nearest, ties to even. */
static inline float from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return ck_from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x0400) return ck_from_bits(sign | ((rest << 13) + (112u << 23)));
    float small = (float)rest * 0x1p-24f;
    return sign ? -small : small;
}

static inline uint16_t to_f16(float value) {
    uint32_t bits = ck_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to 65536 or more */
    if (rest < 0x38800000) {                                  /* below the normal ones: adding 0.5 rounds */
        float shifted = ck_from_bits(rest) + 0.5f;
        return (uint16_t)(sign | (ck_to_bits(shifted) - 0x3f000000));
    }
    rest += 0xfff + (rest >> 13 & 1);
    return (uint16_t)(sign | (rest - (112u << 23)) >> 13);
}

static inline v16 v_read(const void *p, int type, int count) {
    v16 r = v_zero();
    if (type == CK_F32) {
        memcpy(r.v, p, (size_t)count * 4);
        return r;
    }
    for (int i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, (const char *)p + 2 * i, 2);
        r.v[i] = type == CK_BF16 ? ck_from_bf16(half) : from_f16(half);
    }
    return r;
}

/* Words of two 16-bit floats, a in the lower half. */
static inline v16 v_halves(v16 a, v16 b, int type) {
    EACH {
        uint32_t low = type == CK_BF16 ? ck_to_bf16(a.v[i]) : to_f16(a.v[i]);
        uint32_t high = type == CK_BF16 ? ck_to_bf16(b.v[i]) : to_f16(b.v[i]);
        a.v[i] = ck_from_bits(low | high << 16);
    }
    return a;
}

static inline void v_write(void *p, int type, int count, v16 x) {
    if (type == CK_F32) {
        memcpy(p, x.v, (size_t)count * 4);
        return;
    }
    for (int i = 0; i < count; i++) {
        uint16_t half = type == CK_BF16 ? ck_to_bf16(x.v[i]) : to_f16(x.v[i]);
        memcpy((char *)p + 2 * i, &half, 2);
    }
}

#endif
