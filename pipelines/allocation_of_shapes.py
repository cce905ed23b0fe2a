"""Uneven shapes by measured damage: one integer program with one item per layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import CompressError
from compress.solvers.problem import Problem
from compress.solvers.solve import solve
from compress.structure import LayerShape


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDamage:
    """What one layer's choices cost, each measured with everything else whole.

    Attributes:
        attention: (KV groups, query heads in each) -> damage; all of them: 0. No KV group: the attention is gone.
        mlp: Channels -> damage; all of them: 0. No channel: the MLP is gone.
    """

    attention: Mapping[tuple[int, int], float]
    mlp: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeAllocation:
    """The shapes of all layers and the certificate of the solver.

    Attributes:
        shapes: One per layer.
        parameters: Decoder linear weights they keep.
        damage: Summed damage.
        certificate: Solver, status, objective, lower bound, gap, size, seconds.
    """

    shapes: tuple[LayerShape, ...]
    parameters: int
    damage: float
    certificate: Mapping[str, Any]


def allocate_shapes(
    layers: Sequence[LayerDamage],
    parameters: Callable[[LayerShape], int],
    budget: int,
    *,
    allow_drop: bool = False,
    solver: str = "highs",
) -> ShapeAllocation:
    """The shapes with the least summed damage that keep at most ``budget`` weights.

    The choices of a layer are the pairs of its attention and MLP choices, with their damages added up; a layer that
    loses both is left out.

    Args:
        layers: Damages of each layer.
        parameters: Decoder linear weights a layer of a given shape keeps
            (:meth:`compress.prune.shape.UnitSizes.of`).
        budget: Most decoder linear weights to keep in all.
        allow_drop: Whether a layer may lose its attention, its MLP, or both.
        solver: A key of ``compress.solvers.solve.SOLVERS``.

    Raises:
        CompressError: A damage is not finite; the budget is below the smallest that can be kept (named).
        UsageError: There is no such solver.
    """
    choices = [_choices(layer, allow_drop) for layer in layers]
    costs = tuple(np.array([cost for _, cost in layer], dtype=np.float64) for layer in choices)
    sizes = tuple(np.array([parameters(shape) for shape, _ in layer], dtype=np.int64) for layer in choices)
    smallest = sum(int(size.min()) for size in sizes)
    if budget < smallest:
        raise CompressError(
            f"The layers cannot be pruned to {budget:,} decoder linear parameters: these choices keep "
            f"{smallest:,} or more.",
            "Ask for a lower ratio, choose other targets or a smaller channel multiple, or let layers be dropped.",
        )
    problem = Problem(
        names=tuple(f"layer {index}" for index in range(len(layers))),
        costs=costs,
        sizes=sizes,
        budget=budget,
    )
    solution = solve(problem, solver=solver)
    return ShapeAllocation(
        shapes=tuple(layer[i][0] for layer, i in zip(choices, solution.choices, strict=True)),
        parameters=solution.size,
        damage=solution.cost,
        certificate=solution.certificate(),
    )


def _choices(layer: LayerDamage, allow_drop: bool) -> list[tuple[LayerShape, float]]:
    """Every shape the layer may take and its damage, whole layers first (ties go to the first)."""
    return [
        (LayerShape(kv_heads=kv_heads, queries=queries, channels=channels), attention + mlp)
        for (kv_heads, queries), attention in sorted(layer.attention.items(), reverse=True)
        for channels, mlp in sorted(layer.mlp.items(), reverse=True)
        if allow_drop or (kv_heads and channels)
    ]
