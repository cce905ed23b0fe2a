from __future__ import annotations

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.model.architecture import architecture_of
from compress.prune.compensate import compensate, refit
from compress.structure import LayerStructure, kept_columns, structure_map
from tests.tiny import DENSE, VOCAB, tiny_model


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
