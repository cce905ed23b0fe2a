from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.importance.gram_store import GramStore
from compress.kept import Kept
from compress.model.architecture import Architecture, LayerShape, architecture_of
from compress.prune.compensate import (
    compensate,
    gather_moments,
    refit,
    refit_from_store,
    swapped,
)
from compress.structure import LayerStructure, StructureMap, full_layer, kept_columns, structure_map
from tests.tiny import DENSE, VOCAB, tiny_model
from tests.unit.importance.common import linear_inputs
from tests.unit.prune.common import model_architecture
from tests.unit.uneven import structure_of


def test_refit_is_the_ridge_solution_of_lstsq() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    inputs = torch.randn(12, 200, generator=generator, dtype=torch.float64)
    kept = torch.tensor([0, 3, 4, 7, 11])
    damping = 0.05
    found = refit(weight, (inputs @ inputs.T)[:, kept], kept, damping)

    ridge = damping * (inputs[kept] ** 2).sum(1).mean()
    design = torch.cat([inputs[kept].T, ridge.sqrt() * torch.eye(5, dtype=torch.float64)])
    target = torch.cat([(weight @ inputs).T, ridge.sqrt() * weight[:, kept].T])
    expected = torch.linalg.lstsq(design, target).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_refit_of_silent_inputs_keeps_the_weight() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([1, 2])
    assert torch.equal(refit(weight, torch.zeros(4, 2), kept, 0.01), weight[:, kept].double())


@pytest.mark.parametrize("kind", DENSE)
def test_each_refitted_matrix_beats_cutting_it_off(kind: str) -> None:
    model = tiny_model(kind)
    arch = architecture_of(model.config.to_dict())
    generator = torch.Generator().manual_seed(2)
    layers = [
        LayerStructure(
            kv_groups=torch.arange(max(1, arch.kv_heads - 1), dtype=torch.int32),
            channels=torch.randperm(arch.channels, generator=generator)[: arch.channels // 2]
            .sort()
            .values.to(torch.int32),
        )
        for _ in range(arch.layers)
    ]
    structure = structure_map(arch, layers, base_fingerprint="")
    ids = torch.randint(0, VOCAB, (12, 16), generator=generator)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = compensate(model, arch, structure, ids, batch=4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    seen: dict[str, list[torch.Tensor]] = {}
    for name in found:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        model(ids, use_cache=False)
    assert len(found) >= arch.layers
    for layer in range(arch.layers):
        for spec in arch.linears:
            name = arch.module_name(layer, spec)
            if name not in found:
                continue
            columns = kept_columns(arch, spec, structure.layers[layer])
            assert columns is not None
            weight = model.get_submodule(name).weight.detach()
            cut = torch.zeros_like(weight)
            cut[:, columns] = weight[:, columns]
            inputs = torch.cat(seen[name])
            assert torch.equal(found[name] != 0, (cut != 0) & (found[name] != 0))
            after, plain = ((inputs @ (weight - w).T).norm() for w in (found[name], cut))
            assert after < plain


def test_bad_requests_are_refused() -> None:
    model = tiny_model("llama_gqa")
    arch = architecture_of(model.config.to_dict())
    layer = LayerStructure(
        kv_groups=torch.arange(1, dtype=torch.int32), channels=torch.arange(8, dtype=torch.int32)
    )
    structure = structure_map(arch, [layer] * arch.layers, base_fingerprint="")
    with pytest.raises(UsageError, match="damping"):
        compensate(model, arch, structure, torch.zeros(4, 8, dtype=torch.long), damping=0)
    with pytest.raises(CompressError, match="fewer than one batch"):
        compensate(model, arch, structure, torch.zeros(3, 8, dtype=torch.long), batch=4)


def mixed(kind: str) -> tuple[Any, Architecture, StructureMap, torch.Tensor]:
    """A model of two layers: no MLP in the first (nor attention, where it can be pruned), half of the second."""
    model = tiny_model(kind)
    arch = model_architecture(model)
    heads = arch.prunable_heads
    groups, queries = (arch.kv_heads // 2, 1) if heads else (arch.kv_heads, arch.queries_per_group)
    first = LayerShape(kv_heads=0 if heads else arch.kv_heads, queries=arch.queries_per_group, channels=0)
    second = LayerShape(kv_heads=groups, queries=queries, channels=arch.channels // 2)
    structure = structure_of(arch, [first, second], seed=3)
    ids = torch.randint(0, VOCAB, (6, 16), generator=torch.Generator().manual_seed(2))
    return model, arch, structure, ids


def stored_weight(model: Any, name: str, *, transposed: bool) -> torch.Tensor:
    weight: torch.Tensor = model.get_submodule(name).weight.detach().double()
    return weight.T if transposed else weight


KINDS = pytest.mark.parametrize("kind", ["llama_gqa", "qwen2", "gemma2", "phi3", "gpt2"])


@KINDS
def test_the_refit_is_the_least_squares_solution_and_a_lost_branch_has_none(kind: str) -> None:
    model, arch, structure, ids = mixed(kind)
    ids = torch.cat([ids] * 8)[:16]
    found = compensate(model, arch, structure, ids, batch=4, damping=0.02)
    inputs = linear_inputs(copy.deepcopy(model).double(), arch, ids)
    outputs = [spec for spec in arch.linears if spec.role in ("o", "down")]
    lossy = [spec for spec in outputs if arch.prunable_heads or spec.role == "down"]
    assert found.keys() == {arch.module_name(1, spec) for spec in lossy}
    for spec in lossy:
        columns = kept_columns(arch, spec, structure.layers[1])
        assert columns is not None
        weight = stored_weight(model, arch.module_name(1, spec), transposed=spec.transposed)
        x_TC = inputs[1][spec.role]
        ridge = 0.02 * x_TC[:, columns].square().sum(dim=0).mean()
        design = torch.cat([x_TC[:, columns], ridge.sqrt() * torch.eye(len(columns), dtype=torch.float64)])
        target = torch.cat([x_TC @ weight.T, ridge.sqrt() * weight[:, columns].T])
        expected = torch.zeros_like(weight)
        expected[:, columns] = torch.linalg.lstsq(design, target).solution.T
        matrix = found[arch.module_name(1, spec)]
        assert matrix.dtype == torch.float32
        torch.testing.assert_close(matrix.double(), expected, rtol=1e-2, atol=1e-4)


def test_an_interrupted_refit_solves_no_system_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    shape = LayerShape(
        kv_heads=arch.kv_heads // 2, queries=arch.queries_per_group, channels=arch.channels // 2
    )
    structure = structure_of(arch, [shape] * arch.layers, seed=3)
    ids = torch.randint(0, VOCAB, (8, 16), generator=torch.Generator().manual_seed(2))
    whole = compensate(model, arch, structure, ids)
    solved = []

    def counted(*given: Any) -> torch.Tensor:
        solved.append(1)
        return refit(*given)

    def interrupt(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.prune.compensate.refit", counted)
    with pytest.raises(KeyboardInterrupt):
        compensate(model, arch, structure, ids, kept=Kept(tmp_path), progress=interrupt)
    assert len(solved) == 2
    resumed = compensate(model, arch, structure, ids, kept=Kept(tmp_path))
    assert len(solved) == len(whole) == 2 * arch.layers
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_moments_of_an_interrupted_run_are_not_gathered_again(tmp_path: Path) -> None:
    model, arch, _, ids = mixed("llama_gqa")
    down = next(spec for spec in arch.linears if spec.role == "down")
    calm, broken = GramStore(tmp_path / "calm"), GramStore(tmp_path / "broken")
    gather_moments(model, arch, ids, calm, batch=2)

    def interrupt(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather_moments(model, arch, ids, broken, batch=2, progress=interrupt)
    assert [broken.has(layer) for layer in range(arch.layers)] == [True] + [False] * (arch.layers - 1)
    made = (broken.folder / "layer-0.safetensors").stat().st_mtime_ns
    gather_moments(model, arch, ids, broken, batch=2)
    assert (broken.folder / "layer-0.safetensors").stat().st_mtime_ns == made
    for layer in range(arch.layers):
        assert torch.equal(broken.get(layer, down), calm.get(layer, down))


@KINDS
def test_moments_that_are_there_already_give_the_same_refit(kind: str, tmp_path: Path) -> None:
    model, arch, structure, ids = mixed(kind)
    store = GramStore(tmp_path)
    inputs = linear_inputs(copy.deepcopy(model).double(), arch, ids[:4])
    outputs = [spec for spec in arch.linears if spec.role in ("o", "down")]
    for layer in range(arch.layers):
        grams = {spec: inputs[layer][spec.role].T @ inputs[layer][spec.role] for spec in outputs}
        store.put(layer, grams)

    def weight_of(name: str) -> torch.Tensor:
        return stored_weight(model, name, transposed=outputs[0].transposed)

    found = refit_from_store(weight_of, arch, structure, store)
    expected = compensate(model, arch, structure, ids, batch=4)
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        assert (matrix.dtype, matrix.shape) == (torch.float32, expected[name].shape)
        assert torch.equal(matrix == 0, expected[name] == 0)
        torch.testing.assert_close(matrix, expected[name], rtol=1e-2, atol=1e-4)
    again = GramStore(tmp_path / "again")
    assert not again.complete(arch)
    gather_moments(model, arch, ids, again, batch=4)
    assert again.complete(arch)
    for name, matrix in refit_from_store(weight_of, arch, structure, again).items():
        torch.testing.assert_close(matrix, expected[name], rtol=1e-2, atol=1e-4)
    with pytest.raises(UsageError, match="damping"):
        refit_from_store(weight_of, arch, structure, store, damping=0)


def test_nothing_is_repaired_where_nothing_is_lost() -> None:
    model, arch, _, ids = mixed("llama_gqa")
    whole = structure_map(arch, [full_layer(arch)] * arch.layers, base_fingerprint="")
    assert compensate(model, arch, whole, ids) == {}


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_other_weights_for_a_while(kind: str) -> None:
    model, arch, structure, ids = mixed(kind)
    weights = compensate(model, arch, structure, ids, batch=2)
    twin = copy.deepcopy(model)
    for name, weight in weights.items():
        twin.get_submodule(name).weight.data = weight.T.clone() if kind == "gpt2" else weight
    with torch.no_grad():
        plain, expected = model(ids).logits, twin(ids).logits
        assert not torch.allclose(plain, expected)
        with swapped(model, arch, weights):
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, plain)
        with pytest.raises(ZeroDivisionError), swapped(model, arch, weights):
            raise ZeroDivisionError
        with pytest.raises(AttributeError), swapped(model, arch, {**weights, "no.such": plain}):
            raise AssertionError
        assert torch.equal(model(ids).logits, plain)
