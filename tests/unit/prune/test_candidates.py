"""What is measured for an allocation, and the damage between the measured counts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.model.architecture import Architecture
from compress.prune.candidates import candidates, interpolate
from compress.prune.shape import unit_parameters
from tests.unit.prune.layouts import MULTIPLES, TARGET_SETS, UNITS, layouts, pairs_of, smol, widths_of


@given(layouts(), MULTIPLES, TARGET_SETS, UNITS, st.integers(2, 9), st.booleans())
@settings(max_examples=100, deadline=None)
def test_few_are_measured_and_the_ends_among_them(
    arch: Architecture, multiple: int, targets: tuple[str, ...], unit: Any, grid: int, drop: bool
) -> None:
    found = candidates(arch, targets=targets, multiple=multiple, head_unit=unit, grid=grid, allow_drop=drop)
    units = unit_parameters(arch)
    pairs, widths = list(pairs_of(arch, targets, unit)), widths_of(arch, targets, multiple)
    attention, measured, channels = list(found.attention), list(found.measured), list(found.channels)
    assert ((0, arch.queries_per_group) in attention) == (drop and "heads" in targets)
    assert (0 in measured) == (0 in channels) == (drop and "mlp" in targets)
    attention = [pair for pair in attention if pair[0]]
    assert set(attention) <= set(pairs)
    assert len(attention) <= grid
    sizes = [units.attention(*pair) for pair in attention]
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == units.attention(arch.kv_heads, arch.queries_per_group)
    assert sizes[-1] == min(units.attention(*pair) for pair in pairs)
    assert [c for c in channels if c] == widths[::-1]
    kept = [c for c in measured if c]
    assert set(kept) <= set(widths)
    assert kept == sorted(set(kept), reverse=True)
    assert len(kept) == min(grid, len(widths))
    assert {kept[0], kept[-1]} == {widths[0], widths[-1]}


def test_the_sizes_of_a_real_layer() -> None:
    found = candidates(smol(), grid=5)
    assert found.measured == (1536, 1152, 768, 448, 64)
    assert len(found.channels) == 24
    assert found.attention[0] == (3, 3)
    assert found.attention[-1] == (1, 1)
    fixed = candidates(smol(prunable_heads=False), allow_drop=True)
    assert fixed.attention == ((3, 3),)
    assert fixed.measured[-1] == 0
    with pytest.raises(UsageError, match="grid of 1"):
        candidates(smol(), grid=1)


def test_interpolated_damage_by_hand() -> None:
    measured = {16: 0.0, 12: 0.5, 4: 0.25, 0: 4.0}  # 4 channels cannot hurt less than 12
    found = interpolate(measured, [16, 14, 12, 8, 4, 3, 0])
    assert found == pytest.approx({16: 0.0, 14: 0.25, 12: 0.5, 8: 0.5, 4: 0.5, 3: 1.375, 0: 4.0})
    assert interpolate({8: 0.0, 4: -1.0}, [6, 4]) == {6: 0.0, 4: 0.0}
    for outside in (17, -1):
        with pytest.raises(ValueError, match="outside"):
            interpolate(measured, [outside])


@given(st.dictionaries(st.integers(0, 60), st.floats(-1, 9), min_size=2, max_size=9))
def test_interpolated_damage_never_falls_with_what_is_removed(measured: dict[int, float]) -> None:
    counts = range(min(measured), max(measured) + 1)
    damages = list(interpolate(measured, counts).values())
    assert all(a >= b - 1e-12 for a, b in pairwise(damages))
    assert damages[-1] == measured[max(measured)]
    assert all(d >= measured[c] - 1e-12 for c, d in zip(counts, damages, strict=True) if c in measured)
