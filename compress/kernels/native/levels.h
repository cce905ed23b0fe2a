/* Instruction sets by translation unit: a file of one level defines CK_FILE_LEVEL before it includes this.
 *
 * The compiler flags of the library name no instruction set, so nothing outside such a file uses one, and what it
 * defines is reached only through a table that ck_level() picks. Everything in such a file but that table is static.
 */
#ifndef CK_LEVELS_H
#define CK_LEVELS_H

#include "common.h"

#if CK_X86
#include <immintrin.h>

#if CK_FILE_LEVEL > 0
#if CK_FILE_LEVEL == 3 && !defined(CK_EMULATE_BF16)
#define CK_BF16_FILE 1
#else
#define CK_BF16_FILE 0
#endif
#if defined(__clang__)
#define CK_PRAGMA(text) _Pragma(#text)
#if CK_BF16_FILE
#pragma clang attribute push(                                                                                \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2"))), apply_to = function)
#elif CK_FILE_LEVEL >= 2
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2"))), \
                             apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#endif
#define CK_END_OF_LEVEL CK_PRAGMA(clang attribute pop)
#else
#if CK_BF16_FILE
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#elif CK_FILE_LEVEL >= 2
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#define CK_END_OF_LEVEL
#endif
#else
#define CK_END_OF_LEVEL
#endif

#endif /* CK_X86 */

#endif
