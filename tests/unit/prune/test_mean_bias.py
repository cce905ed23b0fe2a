from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import CompressError
from compress.importance.gram_store import GramStore
from compress.importance.obs import ObsConfig, rank_groups
from compress.model.architecture import Architecture, LayerShape
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.prune.compensate import compensate, gather_moments
from compress.prune.mask import GroupMasks
from compress.prune.mean_bias import added_biases, mean_biases, mean_inputs
from compress.prune.slice import slice_checkpoint
from compress.structure import StructureMap, full_layer, kept_columns, structure_map
from tests.tiny import VOCAB, tiny_checkpoint, tiny_model
from tests.unit.importance.common import linear_inputs
from tests.unit.importance.test_taylor import summed_loss
from tests.unit.prune.common import model_architecture
from tests.unit.uneven import IDS, lopsided, relative, structure_of

KINDS = pytest.mark.parametrize("kind", ["llama_gqa", "qwen2", "gemma2", "phi3", "gpt2"])


def mixed(arch: Architecture) -> StructureMap:
    """Of two layers: no MLP in the first (nor attention, where it can be pruned), half of the second."""
    heads = arch.prunable_heads
    first = LayerShape(kv_heads=0 if heads else arch.kv_heads, queries=arch.queries_per_group, channels=0)
    groups, queries = (arch.kv_heads // 2, 1) if heads else (arch.kv_heads, arch.queries_per_group)
    second = LayerShape(kv_heads=groups, queries=queries, channels=arch.channels // 2)
    return structure_of(arch, [first, second], seed=3)


def weight_of(model: Any, arch: Architecture) -> Any:
    def weight(name: str) -> torch.Tensor:
        stored: torch.Tensor = model.get_submodule(name).weight.detach()
        return stored.T if arch.linears[0].transposed else stored

    return weight


def random_ids(count: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count, 16), generator=torch.Generator().manual_seed(2))


@KINDS
def test_a_bias_is_the_mean_of_what_the_removed_inputs_added(kind: str) -> None:
    model = tiny_model(kind)
    arch, ids = model_architecture(model), random_ids(6)
    structure = mixed(arch)
    calls: list[tuple[int, int, str]] = []
    means = mean_inputs(model, arch, ids, batch=4, progress=lambda *call: calls.append(call))
    found = mean_biases(weight_of(model, arch), arch, structure, means)
    inputs = linear_inputs(copy.deepcopy(model).double(), arch, ids[:4])  # an incomplete batch is left out
    expected = {}
    for index, layer in enumerate(structure.layers):
        for spec in arch.linears:
            columns = kept_columns(arch, spec, layer)
            if columns is None:
                continue
            name = arch.module_name(index, spec)
            weight = weight_of(model, arch)(name).double().clone()
            weight[:, columns] = 0
            expected[name] = (inputs[index][spec.role] @ weight.T).mean(dim=0)
    assert found.keys() == expected.keys()
    assert len(found) == (4 if arch.prunable_heads else 2)
    for name, bias in found.items():
        assert (bias.dtype, bias.shape) == (torch.float32, (arch.hidden,))
        assert bool(expected[name].any())
        torch.testing.assert_close(bias.double(), expected[name], rtol=1e-3, atol=1e-5)
    assert [call[:2] for call in calls] == [(1, 2), (2, 2)]


def test_nothing_is_added_where_nothing_is_lost() -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    whole = structure_map(arch, [full_layer(arch)] * arch.layers, base_fingerprint="")
    assert mean_biases(weight_of(model, arch), arch, whole, mean_inputs(model, arch, random_ids(4))) == {}
    with pytest.raises(CompressError, match="fewer than one batch"):
        mean_inputs(model, arch, random_ids(2), batch=4)


def test_activations_that_are_not_finite_are_refused_by_the_name_of_the_linear(tmp_path: Path) -> None:
    model = tiny_model("llama_gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e38)
    arch, ids = model_architecture(model), random_ids(4)
    structure = mixed(arch)
    for computed in (
        lambda: mean_inputs(model, arch, ids),
        lambda: gather_moments(model, arch, ids, GramStore(tmp_path)),
        lambda: compensate(model, arch, structure, ids),
    ):
        with pytest.raises(CompressError, match=r"inputs of model\.layers\.1\.mlp\.down_proj are not finite"):
            computed()
    with pytest.raises(CompressError, match="are not finite on the calibration text") as refused:
        rank_groups(model, arch, ids, ObsConfig(), loss=summed_loss, batch=4)
    assert "--dtype float32" in refused.value.remedy


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
@pytest.mark.parametrize("uneven", [False, True])
def test_the_masked_model_with_added_biases_is_the_one_that_is_written(
    kind: str, uneven: bool, tmp_path: Path
) -> None:
    full = Checkpoint(tiny_checkpoint(kind, tmp_path / "full"))
    arch = checkpoint_architecture(full)
    if uneven:
        structure = structure_of(arch, lopsided(arch))
    else:
        groups = 2 if arch.prunable_heads else arch.kv_heads
        shape = LayerShape(kv_heads=groups, queries=arch.queries_per_group, channels=40)
        structure = structure_of(arch, [shape] * arch.layers)
    model = load_model(full.path, dtype=torch.float32)
    biases = mean_biases(weight_of(model, arch), arch, structure, mean_inputs(model, arch, random_ids(8)))
    biases = {name: 50 * bias for name, bias in biases.items()}  # as a tiny model's are too small to tell
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        with GroupMasks(model, arch, structure.layers):
            bare = model(input_ids=IDS).logits
        with added_biases(model, arch, biases), GroupMasks(model, arch, structure.layers):
            found = model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, plain)
        with pytest.raises(ZeroDivisionError), added_biases(model, arch, biases):
            raise ZeroDivisionError
        assert torch.equal(model(input_ids=IDS).logits, plain)
    slice_checkpoint(full, arch, structure, tmp_path / "small", biases=biases)
    small = load_model(tmp_path / "small", dtype=torch.float32)
    with torch.no_grad():
        cut = small(input_ids=IDS).logits
    assert relative(found, cut) <= 1e-4
    assert relative(found, bare) > 1e-2
