from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.model.architecture import LayerShape
from compress.prune.counts import kept_linear_parameters, shape_parameters, unit_sizes
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
    assert shape_parameters(arch, shape) == by_hand
    full = full_shape(arch)
    structure = structure_of(arch, [full, shape, full], seed)
    assert kept_linear_parameters(arch, structure) == by_hand + 2 * shape_parameters(arch, full)


def test_everything_is_counted_once() -> None:
    arch = architecture()
    full = full_shape(arch)
    assert shape_parameters(arch, full) * arch.layers == arch.decoder_linear_parameters()
    group, channel = unit_sizes(arch)
    fewer = LayerShape(kv_heads=full.kv_heads - 1, queries=full.queries, channels=full.channels - 2)
    assert shape_parameters(arch, full) - shape_parameters(arch, fewer) == group + 2 * channel


@pytest.mark.parametrize("seed", range(3))
def test_every_group_keeps_its_own_query_heads(seed: int) -> None:
    arch = architecture(heads=16)
    shape = LayerShape(kv_heads=3, queries=2, channels=5)
    layer = layer_of(arch, shape, torch.Generator().manual_seed(seed))
    assert layer.query_heads is not None
    owners = [head // 4 for head in layer.query_heads.tolist()]
    assert owners == [group for group in layer.kv_groups.tolist() for _ in range(2)]
