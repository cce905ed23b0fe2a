/* Rounding with AVX2. */
#define CK_FILE_LEVEL 1
#include "levels.h"

#if CK_X86
#include "blocks.h"
#include "importance.h"
#include "rounding.h"

const ck_quantizers ck_quantize_avx2 = CK_QUANTIZERS;
CK_END_OF_LEVEL
#endif
