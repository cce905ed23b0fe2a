"""What `compress.adapters.factors` computes, for many matrices of equal shapes by one call each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from compress.adapters.batched import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class AddProduct:
    """``W + scaling * L R`` of stacks W [n, rows, columns], L [n, rows, r] and R [n, r, columns], summed in float32.

    Rounded once. With a mask, bool [n, rows, columns], the product counts only where it is True.

    Attributes:
        scaling: Of all of them.
        stored: The type of the results.
        in_place: Whether that is the type of W, whose memory they then take.
    """

    scaling: float
    stored: torch.dtype
    in_place: bool

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """W, L, R and perhaps a mask to the new W."""
        weight, left, right = inputs[0], inputs[1].float(), inputs[2].float()
        if len(inputs) == 4:
            total = torch.bmm(left, right).mul_(self.scaling).mul_(inputs[3])
            total.add_(weight if weight.dtype.itemsize <= 4 else weight.float())
        else:
            total = weight.float().baddbmm_(left, right, alpha=self.scaling)
        if not self.in_place:
            return (total.to(self.stored),)
        return (weight if total.data_ptr() == weight.data_ptr() else weight.copy_(total),)

    def workspace(self, inputs: Sequence[Spec]) -> int:
        """The float32 sums, and factors in float32."""
        weight, *factors = inputs[:3]
        sums = 0 if weight.dtype == torch.float32 and len(inputs) == 3 else 4 * prod(weight.shape)
        wide = 8 * prod(weight.shape) if weight.dtype.itemsize > 4 and len(inputs) == 4 else sums
        return wide + sum(0 if f.dtype == torch.float32 else 4 * prod(f.shape) for f in factors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompress:
    """Factors A [n, r, in] and B [n, out, r] cut to a rank, as `compress.adapters.factors.recompress` does.

    Results are A [n, rank, in] and B [n, out, rank] in their types, then squared norms and what of them was cut off,
    float64 [n, 2]; without a rank the latter alone.

    Attributes:
        rank: At most r; None: nothing is cut.
    """

    rank: int | None

    @property
    def in_place(self) -> bool:
        """Never."""
        return False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """A and B to the results."""
        factor_a, factor_b = inputs
        wide_a, wide_b = factor_a.double().mT, factor_b.double()
        if self.rank is None:
            left_r, right_r = (torch.linalg.qr(wide, mode="r").R for wide in (wide_b, wide_a))
            norms = (left_r @ right_r.mT).square().sum(dim=(1, 2))
            return (torch.stack([norms, torch.zeros_like(norms)], dim=1),)
        left_q, left_r = torch.linalg.qr(wide_b)
        right_q, right_r = torch.linalg.qr(wide_a)
        core = left_r @ right_r.mT
        core_u, values, core_vh = torch.linalg.svd(core, full_matrices=False)
        root = values[:, : self.rank].sqrt()
        cut_a = root[:, :, None] * (core_vh[:, : self.rank] @ right_q.mT)
        cut_b = (left_q @ core_u[:, :, : self.rank]) * root[:, None, :]
        lost = values[:, self.rank :].square().sum(dim=1)
        norms = torch.stack([core.square().sum(dim=(1, 2)), lost], dim=1)
        return cut_a.to(factor_a.dtype), cut_b.to(factor_b.dtype), norms

    def workspace(self, inputs: Sequence[Spec]) -> int:
        """Factors in float64, their orthogonal parts with what the decomposition needs, and what was cut of them."""
        return 8 * 4 * sum(prod(factor.shape) for factor in inputs)
