from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.model.architecture import LayerShape
from compress.prune.counts import kept_linear_parameters
from compress.prune.shape import unit_parameters
from compress.structure import full_shape
from tests.unit.prune.common import FUSED, SPECS, architecture
from tests.unit.uneven import layer_of, structure_of


@given(st.integers(0, 4), st.integers(1, 2), st.integers(0, 24), st.booleans(), st.integers(0, 99))
def test_a_shape_has_the_parameters_its_structures_keep(
    kv_heads: int, queries: int, channels: int, fused: bool, seed: int
) -> None:
    arch = architecture(linears=FUSED if fused else SPECS, layers=3)
    shape = LayerShape(kv_heads=kv_heads, queries=queries, channels=channels)
    by_hand = 32 * 4 * (2 * kv_heads * queries + 2 * kv_heads) + 3 * 32 * channels
    units, full = unit_parameters(arch), full_shape(arch)
    assert units.of(shape) == by_hand
    structure = structure_of(arch, [full, shape, full], seed)
    assert kept_linear_parameters(arch, structure) == by_hand + 2 * units.of(full)


def test_everything_is_counted_once() -> None:
    arch = architecture()
    whole = structure_of(arch, [full_shape(arch)] * arch.layers, 0)
    assert kept_linear_parameters(arch, whole) == arch.decoder_linear_parameters()


@pytest.mark.parametrize("seed", range(3))
def test_every_group_keeps_its_own_query_heads(seed: int) -> None:
    arch = architecture(heads=16)
    shape = LayerShape(kv_heads=3, queries=2, channels=5)
    layer = layer_of(arch, shape, torch.Generator().manual_seed(seed))
    assert layer.query_heads is not None
    owners = [head // 4 for head in layer.query_heads.tolist()]
    assert owners == [group for group in layer.kv_groups.tolist() for _ in range(2)]
