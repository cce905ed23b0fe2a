"""Fisher information of a model's linears against autograd on whole weights, window by window, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.adapters.loss import TokenLoss
from compress.errors import CompressError
from compress.importance.modules import decoder_linear
from compress.model.architecture import Architecture
from compress.quantize.fisher import Fisher
from compress.quantize.fisher_collect import gather_fisher, layer_rounds
from tests.tiny import VOCAB, tiny_model
from tests.unit.importance.common import Allocations
from tests.unit.importance.test_taylor import summed_loss
from tests.unit.prune.common import architecture, delta_of, model_architecture, with_lora


def text(windows: int = 4, length: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))


def autograd(model: Any, arch: Architecture, ids: Tensor) -> dict[str, Tensor]:
    """Module name -> sum over windows of the squared gradient of the weight [out, in], float64."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    sums: dict[str, Tensor] = {}
    for window in ids:
        model.zero_grad()
        summed_loss(model, window[None]).backward()
        for layer in range(arch.layers):
            for spec in arch.linears_at(layer):
                gradient = decoder_linear(model, arch, layer, spec).get_parameter("weight").grad
                assert gradient is not None
                name = arch.module_name(layer, spec)
                squared = (gradient.T if spec.transposed else gradient).square()
                sums[name] = sums[name] + squared if name in sums else squared
    return sums


def check(found: dict[str, Fisher], expected: dict[str, Tensor], examples: int) -> None:
    assert list(found) == list(expected)
    for name, fisher in found.items():
        assert fisher.examples == examples
        size = float(expected[name].max())
        for sums, axis in ((fisher.rows, 1), (fisher.columns, 0)):
            total = expected[name].sum(axis)
            torch.testing.assert_close(sums.double(), total, rtol=1e-4, atol=1e-6 * float(total.max()))
        if fisher.full is not None:
            torch.testing.assert_close(fisher.full.double(), expected[name], rtol=1e-4, atol=1e-6 * size)


@pytest.mark.parametrize(
    "kind", ["llama_gqa", "llama_tied", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"]
)
def test_sums_are_those_of_single_window_gradients(kind: str) -> None:
    model = tiny_model(kind)
    arch = model_architecture(model)
    ids = text()
    found = gather_fisher(model, arch, ids, loss=summed_loss, full=True, chunk=500)
    assert all(fisher.full is not None for fisher in found.values())
    check(found, autograd(model, arch, ids), 4)


def test_windows_are_squared_before_they_are_added() -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    ids = text(3)
    parts = [gather_fisher(model, arch, ids[i : i + 1], loss=summed_loss) for i in range(3)]
    for name, fisher in gather_fisher(model, arch, ids, loss=summed_loss).items():
        torch.testing.assert_close(fisher.rows, sum(part[name].rows for part in parts))
        assert fisher.full is None


def test_layers_can_be_taken_in_rounds_with_the_loss_of_the_pipelines() -> None:
    model = tiny_model("llama_tied")
    arch = model_architecture(model)
    ids, token_loss = text(2), TokenLoss(model)
    found: dict[str, Fisher] = {}
    for layers in (range(0, 1), range(1, 3)):
        found |= gather_fisher(
            model, arch, ids, loss=lambda _, ids_BS: token_loss(ids_BS, ids_BS), layers=layers
        )
    check(found, autograd(model, arch, ids), 2)
    assert gather_fisher(model, arch, ids, loss=summed_loss, layers=[]) == {}


def test_an_adapter_counts_as_part_of_the_weight() -> None:
    plain = tiny_model("llama_gqa")
    arch = model_architecture(plain)
    adapted = with_lora(copy.deepcopy(plain), arch, seed=3)
    with torch.no_grad():
        for layer in range(arch.layers):
            for spec in arch.linears_at(layer):
                delta = delta_of(adapted, arch, layer, spec)
                decoder_linear(plain, arch, layer, spec).get_parameter("weight").add_(delta)
    check(
        gather_fisher(adapted, arch, text(2), loss=summed_loss, full=True), autograd(plain, arch, text(2)), 2
    )


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama_gqa").train()
    arch = model_architecture(model)
    model.get_submodule("model.layers.1").eval()
    flags = [index % 3 == 0 for index, _ in enumerate(model.parameters())]
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    seen: list[tuple[int, int]] = []
    gather_fisher(
        model,
        arch,
        text(3),
        loss=summed_loss,
        progress=lambda done, total, _: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_no_gradient_of_a_whole_weight_ever_exists() -> None:
    model = tiny_model("llama_mha")
    arch = model_architecture(model)
    ids, sizes = text(1, length=8), []
    for chunk in (320, 1 << 20):
        with Allocations() as watched:
            gather_fisher(model, arch, ids, loss=summed_loss, chunk=chunk)
        sizes.append(watched.largest)
    assert sizes[0] < 96 * 32 == sizes[1]


def test_rounds_keep_within_the_limit() -> None:
    arch = architecture(layers=5)
    layer = sum(4 * out * into for out, into in map(arch.linear_shape, arch.linears))
    for limit, sizes in ((1, [1] * 5), (2 * layer, [2, 2, 1]), (3 * layer - 1, [2, 2, 1]), (9 * layer, [5])):
        rounds = layer_rounds(arch, limit)
        assert [len(part) for part in rounds] == sizes
        assert [index for part in rounds for index in part] == list(range(5))


def test_no_text_and_gradients_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    for ids in (text(0), text(2, length=1)):
        with pytest.raises(CompressError, match="Calibration got"):
            gather_fisher(model, arch, ids, loss=summed_loss)

    def broken(network: Any, ids: Tensor) -> Tensor:
        return summed_loss(network, ids) * torch.inf

    with pytest.raises(CompressError, match=r"gradients of model\.layers\.0.* are not finite"):
        gather_fisher(model, arch, text(1), loss=broken)
