/* The kernels in plain C. */
#define CK_FILE_LEVEL 0
#include "levels.h"

#include "vector_scalar.h"

#include "kernels_body.h"

const ck_kernels ck_kernels_scalar = CK_KERNELS;
