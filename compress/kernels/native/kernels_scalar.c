/* The kernels in plain C. */
#define CK_FILE_LEVEL 0
#include "levels.h"

#include "vector_scalar.h"

#include "kernels_body.h"

const ck_kernels ck_kernels_scalar = {MOST_DIRECT, MOST_DIRECT_BF16, direct, panel, dequantize, inner, widen, peak};
