"""Removal orders on groups of input columns: greedy optimal brain surgeon, output errors weighed by gradients.

For a linear ``y = W x`` whose columns R are removed and whose other columns are refitted by least squares, the loss
rises by about ``1/2 tr(S W_R (H^-1)_RR^-1 W_R^T)`` (nats per token), where ``H`` is the mean of ``x x^T`` and ``S``
the mean of ``g g^T`` of the loss gradient at y (a Fisher approximation of the loss's curvature there). This is
optimal brain surgeon (Hassibi and Stork 1993) on whole groups; nothing of the size of the weights' gradient exists.

Shapes: C columns, U units of some columns each, K rows of a root of S (``root^T root = S``), B columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RemovalOrder:
    """A nested order in which units may be removed.

    Attributes:
        units: int64 [U], the first to go first.
        damage: float64 [U + 1], predicted rise of the loss (nats per token) once the first n units are gone and
            the rest is refitted; never falls.
    """

    units: Tensor
    damage: Tensor


def damped_inverse(gram_CC: Tensor, damping: float) -> Tensor:
    """``(H + d I)^-1`` in float64, d being ``damping`` times the mean diagonal of H (1 where H is zero)."""
    gram = gram_CC.double()
    ridge = float(damping * gram.diagonal().mean())
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(gram + (ridge if ridge > 0 else 1.0) * identity))


def column_order(weight_KC: Tensor, inverse_CC: Tensor, *, block: int = 1) -> RemovalOrder:
    """Greedy order for single columns: each time the ones whose loss costs least, then refit the rest.

    Args:
        weight_KC: ``root @ W``, float64.
        inverse_CC: Of :func:`damped_inverse`.
        block: Columns removed between two refits; 1 is the plain greedy order.
    """
    weight, inverse = weight_KC, inverse_CC
    names = torch.arange(weight.shape[1], device=weight.device)
    units = []
    while len(names):
        price = weight.square().sum(dim=0) / inverse.diagonal()
        chosen = price.topk(min(block, len(names)), largest=False, sorted=True).indices
        _, weight, inverse = remove(weight, inverse, chosen)
        units.append(names[chosen])
        rest = torch.ones(len(names), dtype=torch.bool, device=names.device)
        rest[chosen] = False
        names = names[rest]
    order = torch.cat(units)
    return RemovalOrder(units=order.cpu(), damage=damage_along(weight_KC, inverse_CC, order))


def block_order(
    weight_KC: Tensor, inverse_CC: Tensor, members: list[Tensor], allowed: list[list[int]] | None = None
) -> RemovalOrder:
    """Greedy order for units of several columns each.

    Args:
        weight_KC: ``root @ W``, float64.
        inverse_CC: Of :func:`damped_inverse`.
        members: Columns of every unit, int64.
        allowed: Rounds: in each, one unit of every list goes before the next round begins; None: no rounds.
            The lists are sets of units that must lose equally many, as the heads of KV groups.
    """
    weight, inverse = weight_KC, inverse_CC
    place = dict(enumerate(members))
    waiting = [list(units) for units in allowed] if allowed is not None else []
    units, damages = [], []
    open_lists: list[list[int]] = []
    while place and (allowed is None or any(waiting)):
        if allowed is not None and not open_lists:
            open_lists = [units_ for units_ in waiting if units_]
        choice = list(place) if allowed is None else [unit for units_ in open_lists for unit in units_]
        price = {unit: _block_price(weight, inverse, place[unit]) for unit in choice}
        best = min(choice, key=lambda unit: (price[unit], unit))
        removed = place.pop(best)
        steps, weight, inverse = remove(weight, inverse, removed)
        units.append(best)
        damages.append(steps.sum().reshape(1))
        place = {unit: _renumber(columns, removed) for unit, columns in place.items()}
        for units_ in list(open_lists):
            if best in units_:
                units_.remove(best)
                open_lists.remove(units_)
    return _order(torch.tensor(units), torch.cat(damages))


def damage_along(weight_KC: Tensor, inverse_CC: Tensor, columns: Tensor) -> Tensor:
    """Damage [n + 1] of removing ``columns`` [n] one after the other in the given order, float64.

    One Cholesky factorization gives the whole curve: with ``(H^-1)_RR = L L^T`` the n-th step costs half the
    squared n-th row of ``L^-1 W_R^T``.
    """
    if len(columns) == 0:
        return torch.zeros(1, dtype=torch.float64)
    factor = torch.linalg.cholesky(inverse_CC[columns][:, columns])
    rows = torch.linalg.solve_triangular(factor, weight_KC[:, columns].T, upper=False)
    return torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * rows.square().sum(dim=1).cumsum(0).cpu()])


def remove(weight: Tensor, inverse: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Remove ``chosen`` columns [B]: their costs one after the other, and both matrices of the refitted rest."""
    rest = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    rest[chosen] = False
    factor = torch.linalg.cholesky(inverse[chosen][:, chosen])
    rows_BK = torch.linalg.solve_triangular(factor, weight[:, chosen].T, upper=False)
    cross_BC = torch.linalg.solve_triangular(factor, inverse[chosen][:, rest], upper=False)
    steps = 0.5 * rows_BK.square().sum(dim=1)
    return (
        steps,
        torch.addmm(weight[:, rest], rows_BK.T, cross_BC, alpha=-1),
        torch.addmm(inverse[rest][:, rest], cross_BC.T, cross_BC, alpha=-1),
    )


def _block_price(weight: Tensor, inverse: Tensor, columns: Tensor) -> float:
    factor = torch.linalg.cholesky(inverse[columns][:, columns])
    return float(torch.linalg.solve_triangular(factor, weight[:, columns].T, upper=False).square().sum())


def _renumber(columns: Tensor, removed: Tensor) -> Tensor:
    """Indices of ``columns`` after ``removed`` ones are cut out."""
    return columns - (removed[None, :] < columns[:, None]).sum(dim=1)


def _order(units: Tensor, steps: Tensor) -> RemovalOrder:
    damage = torch.cat([torch.zeros(1, dtype=torch.float64), steps.double().cpu().cumsum(0)])
    return RemovalOrder(units=units.cpu(), damage=damage)
