/* The kernels with AVX2 and FMA. */
#define CK_FILE_LEVEL 1
#include "levels.h"

#if CK_X86
#include "vector_avx2.h"

#include "kernels_body.h"

CK_END_OF_LEVEL

const ck_kernels ck_kernels_avx2 = CK_KERNELS;
#endif
