/* Which instruction-set level is in force. */
#include "common.h"

static int chosen = -1;

/* The best level of this processor (and of the operating system, which __builtin_cpu_supports asks too). */
CK_EXPORT int ck_best_level(void) {
#if CK_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
        return CK_SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return CK_AVX2;
#if CK_HAS_BF16
#ifndef CK_EMULATE_BF16
    if (__builtin_cpu_supports("avx512bf16"))
#endif
        return CK_AVX512_BF16;
#endif
    return CK_AVX512;
#else
    return CK_SCALAR;
#endif
}

CK_EXPORT int ck_level(void) {
    if (chosen < 0) chosen = ck_best_level();
    return chosen;
}

/* Ask for a level; what the processor lacks is not given. Returns the level in force. */
CK_EXPORT int ck_set_level(int level) {
    int best = ck_best_level();
    chosen = level < 0 || level > best ? best : level;
    return chosen;
}

CK_EXPORT int ck_abi(void) { return CK_ABI; }
