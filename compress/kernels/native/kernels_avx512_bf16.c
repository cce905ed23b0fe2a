/* The kernels with AVX-512 and its bfloat16 instructions. */
#include "common.h"
#define CK_FILE_LEVEL 3
#include "levels.h"

#if CK_HAS_BF16
#include "vector_avx512.h"

#include "vector_avx512_bf16.h"

#include "kernels_body.h"

CK_END_OF_LEVEL

const ck_kernels ck_kernels_avx512_bf16 = CK_KERNELS;
#endif
