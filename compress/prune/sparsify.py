"""Which single weights stay: the best of every row, or N of every M neighbours in a row (LoRAM's Unst and Semi)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError, UsageError

# O: output rows, I: input columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """N weights of every M neighbours of a row stay."""

    kept: int
    of: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


def parse_pattern(text: str) -> Pattern:
    """``"4:8"`` as a pattern.

    Raises:
        UsageError: It is not ``N:M`` with 0 < N < M.
    """
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise UsageError(
            f"--pattern {text!r} is not understood.", "Give N:M with N below M, such as 4:8 or 2:4."
        )
    return Pattern(kept=int(found[1]), of=int(found[2]))


def weight_scores(weight_OI: Tensor, norm_I: Tensor | None) -> Tensor:
    """How much each weight counts, [out, in] in float32: ``|W|``, or with ``norm_I`` Wanda's ``|W_oi| ||x_i||``.

    Args:
        weight_OI: The weight.
        norm_I: L2 norms of the input features over calibration text (arXiv 2306.11695); None: magnitude.
    """
    size_OI = weight_OI.float().abs()
    return size_OI if norm_I is None else size_OI * norm_I.to(size_OI.device, torch.float32)


def keep_share(scores_OI: Tensor, ratio: float) -> Tensor:
    """Mask [out, in] (True stays) that drops the same number of lowest scores in every row, nearest to ``ratio``.

    Ties go by position: of equal scores the first ones stay.
    """
    return _best(scores_OI, scores_OI.shape[1] - round(ratio * scores_OI.shape[1]))


def keep_pattern(scores_OI: Tensor, pattern: Pattern) -> Tensor:
    """Mask [out, in] (True stays) with the ``pattern.kept`` best of every ``pattern.of`` neighbours in a row.

    Raises:
        CompressError: Rows cannot be divided into such neighbours.
    """
    out, into = scores_OI.shape
    if into % pattern.of:
        raise CompressError(
            f"Rows of {into} weights cannot be divided into groups of {pattern.of}.",
            "Give another --pattern, or --shape unstructured.",
        )
    return _best(scores_OI.reshape(-1, pattern.of), pattern.kept).reshape(out, into)


def _best(scores_NG: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest of every row."""
    order_NG = scores_NG.argsort(dim=1, descending=True, stable=True)
    mask_NG = torch.zeros_like(scores_NG, dtype=torch.bool)
    return mask_NG.scatter_(1, order_NG[:, :count], True)
