"""LoRA-guided importance by the C library, or on a GPU by Triton, with no temporary of the matrix's size.

In C, sums are float32 within 256 columns or 64 rows and float64 beyond. Their order depends on the instruction-set
level, not on the number of threads.

Shapes: O out, I in, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kernels.calling import call, contiguous
from compress.kernels.gpu import on_gpu


def importance_sums(
    weight_OI: Tensor, left_OR: Tensor, right_RI: Tensor, *, over_columns: bool, square: bool
) -> Tensor:
    """``(G * W)^2`` or ``|G * W|`` summed over each row, float64 [O], or each column, [I].

    ``G`` is the product of the first two thirds of the factors, ``W`` the weight plus that of the last third.

    Args:
        weight_OI: float32.
        left_OR: float32 [O, 3 R].
        right_RI: float32 [3 R, I].
        over_columns: Sum over each column, not over each row.
        square: Squares, not absolute values.
    """
    if on_gpu(weight_OI):
        from compress.kernels.triton import importance

        return importance.importance_sums(
            weight_OI, left_OR, right_RI, over_columns=over_columns, square=square
        )
    rows, columns = weight_OI.shape
    sums = torch.empty(columns if over_columns else rows, dtype=torch.float64)
    sizes = (rows, columns, left_OR.shape[1] // 3, int(square), int(over_columns))
    call("ck_importance_sums", *contiguous(weight_OI, left_OR, right_RI), sums, sizes=sizes)
    return sums
