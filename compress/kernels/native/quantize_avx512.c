/* Rounding with AVX-512. */
#define CK_FILE_LEVEL 2
#include "levels.h"

#if CK_X86
#include "blocks.h"
#include "importance.h"
#include "rounding.h"

const ck_quantizers ck_quantize_avx512 = CK_QUANTIZERS;
CK_END_OF_LEVEL
#endif
