/* What every file of the library shares: exports, instruction-set levels, threads, 16-bit floats.
 *
 * Names: ck_ is the prefix of everything that is visible outside its file. Sizes and indices are int64_t.
 */
#ifndef CK_COMMON_H
#define CK_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define CK_EXPORT __declspec(dllexport)
#else
#define CK_EXPORT __attribute__((visibility("default")))
#endif

#if defined(__x86_64__)
#define CK_X86 1
#else
#define CK_X86 0
#endif

/* Changed with every change of an exported signature, a structure or the packed layout; library.py has the same. */
#define CK_ABI 3

/* Instruction-set levels, each a superset of the one before. */
enum { CK_SCALAR = 0, CK_AVX2 = 1, CK_AVX512 = 2, CK_AVX512_BF16 = 3 };

/* Whether the compiler knows AVX-512-BF16. With CK_EMULATE_BF16 its two instructions are computed by others, to be
 * tested on processors that lack them. */
#if CK_X86 && (defined(CK_EMULATE_BF16) || (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11))
#define CK_HAS_BF16 1
#else
#define CK_HAS_BF16 0
#endif

/* The level in force: the best that the processor has unless a lower one was asked for. */
CK_EXPORT int ck_level(void);

/* Types of x, y and dequantized weights. */
enum { CK_F32 = 0, CK_BF16 = 1, CK_F16 = 2 };

/* A piece of work: items begin to end (end not included). */
typedef void (*ck_task)(void *argument, int64_t begin, int64_t end);

/* Run a task over items 0 to count on at most `threads` threads, the caller among them.
 *
 * The items are cut into as many equal ranges as there are threads, each a multiple of `grain` items but the last.
 * Returns when all is done. A call from inside a task, or while another thread's call runs, is done by the caller
 * alone, so the ranges that a task sees depend on nothing but the arguments only in their union.
 */
void ck_parallel(int64_t count, int64_t grain, int threads, ck_task task, void *argument);

static inline int64_t ck_min(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t ck_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline float ck_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t ck_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float ck_from_bf16(uint16_t half) { return ck_from_bits((uint32_t)half << 16); }

/* Rounded to nearest, ties to even; a NaN stays one. */
static inline uint16_t ck_to_bf16(float value) {
    uint32_t bits = ck_to_bits(value);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#endif
