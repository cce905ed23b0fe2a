"""Uneven shapes by measured damage against brute force."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError, UsageError
from compress.pipelines.allocation_of_shapes import LayerDamage, allocate_shapes
from compress.prune.shape import plan_of, unit_parameters
from compress.structure import LayerShape, full_shape
from tests.unit.prune.common import architecture
from tests.unit.prune.layouts import removed

ARCH = architecture(layers=3, channels=12)
UNITS = unit_parameters(ARCH)
FULL = full_shape(ARCH)


def tables(seed: int, *, layers: int = 3) -> list[LayerDamage]:
    """Random damages, with removed branches among the choices."""
    rng = np.random.default_rng(seed)

    def layer() -> LayerDamage:
        pairs = [(2, 2), (4, 1), (1, 1), (0, 2)]
        mlp = dict(zip((8, 4, 0), np.sort(rng.random(3)).tolist(), strict=True))
        return LayerDamage(
            attention={(4, 2): 0.0, **dict(zip(pairs, rng.random(4).tolist(), strict=True))},
            mlp={12: 0.0, **mlp},
        )

    return [layer() for _ in range(layers)]


def brute_force(layers: list[LayerDamage], budget: int, *, allow_drop: bool) -> tuple[float, int]:
    """Least damage within the budget and the least size that has it."""
    options = []
    for layer in layers:
        mine = []
        for (pair, a), (channels, m) in product(layer.attention.items(), layer.mlp.items()):
            size = UNITS.of(LayerShape(kv_heads=pair[0], queries=pair[1], channels=channels))
            if (pair[0] and channels) or allow_drop:
                mine.append((a + m, size))
        options.append(mine)
    fits = [
        (sum(c for c, _ in chosen), sum(s for _, s in chosen))
        for chosen in product(*options)
        if sum(s for _, s in chosen) <= budget
    ]
    return min(fits, key=lambda pair: (round(pair[0], 9), pair[1]))


@given(st.integers(0, 999), st.floats(0.3, 1.0), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_least_damage_of_all(seed: int, share: float, allow_drop: bool) -> None:
    layers = tables(seed)
    budget = int(share * ARCH.decoder_linear_parameters())
    found = allocate_shapes(layers, UNITS.of, budget, allow_drop=allow_drop)
    damage, size = brute_force(layers, budget, allow_drop=allow_drop)
    assert found.damage == pytest.approx(damage, rel=1e-4)  # the gap the solver is asked for
    assert found.parameters == sum(UNITS.of(shape) for shape in found.shapes) <= budget
    assert found.certificate["lower_bound"] <= damage + 1e-9
    assert found.certificate["gap"] <= 1e-4
    if found.damage == pytest.approx(damage, rel=1e-12):
        assert found.parameters == size
    if not allow_drop:
        assert all(shape.kv_heads and shape.channels for shape in found.shapes)
    plan = plan_of(ARCH, found.shapes, 1 - share, "")
    assert plan.achieved == pytest.approx(1 - found.parameters / ARCH.decoder_linear_parameters())
    assert plan.achieved == pytest.approx(removed(ARCH, found.shapes))


@pytest.mark.parametrize("solver", ["highs", "dynamic", "lagrangian"])
def test_every_solver_and_the_same_answer_twice(solver: str) -> None:
    layers, budget = tables(7), ARCH.decoder_linear_parameters() // 2
    one = allocate_shapes(layers, UNITS.of, budget, allow_drop=True, solver=solver)
    two = allocate_shapes(layers, UNITS.of, budget, allow_drop=True, solver=solver)
    assert one.shapes == two.shapes
    assert one.certificate["solver"] == solver
    assert one.parameters <= budget
    best, _ = brute_force(layers, budget, allow_drop=True)
    assert (
        one.damage == pytest.approx(best, rel=1e-4) if solver != "lagrangian" else one.damage >= best - 1e-12
    )


def test_a_layer_may_be_dropped() -> None:
    whole: dict[str, Any] = {"attention": {(4, 2): 0.0, (0, 2): 0.1}, "mlp": {12: 0.0, 0: 0.2}}
    dear: dict[str, Any] = {"attention": {(4, 2): 0.0, (0, 2): 5.0}, "mlp": {12: 0.0, 0: 5.0}}
    layers = [LayerDamage(**dear), LayerDamage(**whole)]
    found = allocate_shapes(layers, UNITS.of, UNITS.of(FULL), allow_drop=True)
    assert found.shapes == (FULL, LayerShape(kv_heads=0, queries=2, channels=0))
    assert found.damage == pytest.approx(0.3)
    with pytest.raises(CompressError, match=f"keep {2 * UNITS.of(FULL):,} or more"):
        allocate_shapes(layers, UNITS.of, UNITS.of(FULL))


def test_everything_stays_where_there_is_room() -> None:
    found = allocate_shapes(tables(3), UNITS.of, ARCH.decoder_linear_parameters(), allow_drop=True)
    assert found.shapes == (FULL,) * 3
    assert (found.damage, found.certificate["gap"]) == (0.0, 0.0)


def test_impossible_requests() -> None:
    with pytest.raises(CompressError, match="cannot be pruned to 10 decoder linear parameters"):
        allocate_shapes(tables(1), UNITS.of, 10)
    with pytest.raises(UsageError, match="no solver 'guess'"):
        allocate_shapes(tables(1), UNITS.of, ARCH.decoder_linear_parameters(), solver="guess")
    broken = LayerDamage(attention={(4, 2): 0.0}, mlp={12: float("nan")})
    with pytest.raises(CompressError, match="layer 0 has a cost that is not a finite number"):
        allocate_shapes([broken], UNITS.of, 10**9)
