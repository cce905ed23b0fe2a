/* The kernels with AVX-512 (F, BW, VL, DQ). */
#define CK_FILE_LEVEL 2
#include "levels.h"

#if CK_X86
#include "vector_avx512.h"

#include "kernels_body.h"

CK_END_OF_LEVEL

const ck_kernels ck_kernels_avx512 = CK_KERNELS;
#endif
