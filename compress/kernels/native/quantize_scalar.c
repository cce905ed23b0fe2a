/* Rounding where no instruction set is asked for. */
#define CK_FILE_LEVEL 0
#include "blocks.h"
#include "importance.h"
#include "rounding.h"

const ck_quantizers ck_quantize_scalar = CK_QUANTIZERS;
