"""Output sensitivities against autograd in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from compress.model.layout import Architecture
from compress.quantize.sensitivity import output_sensitivities
from tests.tiny import VOCAB, tiny_model
from tests.unit.importance.test_taylor import summed_loss
from tests.unit.prune.common import model_architecture


def text(windows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (windows, 10), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["llama_gqa", "qwen3", "phi3", "gpt2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_sensitivities_are_mean_squared_gradients_at_the_outputs(kind: str, batch: int) -> None:
    model = tiny_model(kind)
    arch: Architecture = model_architecture(model)
    ids = text(4)
    found = output_sensitivities(model, arch, ids.split(batch), summed_loss)
    exact = copy.deepcopy(model).double().requires_grad_(True)
    kept: dict[str, torch.Tensor] = {}
    names = [arch.module_name(layer, spec) for layer in range(arch.layers) for spec in arch.linears]
    for name in (arch.embedding_module, *names):

        def keep(_: object, __: object, output: torch.Tensor, name: str = name) -> None:
            output.retain_grad()
            kept[name] = output

        exact.get_submodule(name).register_forward_hook(keep)
    summed_loss(exact, ids).backward()
    assert set(found) == set(kept)
    for name, output in kept.items():
        assert output.grad is not None
        expected = output.grad.flatten(0, 1).square().mean(0)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-10)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama_gqa")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    output_sensitivities(model, model_architecture(model), [text(2)], summed_loss)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_noise_of_the_weights_costs_about_what_is_predicted() -> None:
    model = tiny_model("llama_gqa").double()
    arch = model_architecture(model)
    ids = text(64, seed=1)
    layer, spec = 1, arch.linears[-1]
    name = arch.module_name(layer, spec)
    # Labels from the model itself: there the Fisher information is the curvature and the gradient's mean is zero.
    sums = torch.zeros(arch.linear_shape(spec)[0], dtype=torch.float64)
    inputs: list[torch.Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        reference = model(ids).logits.log_softmax(-1)
    handle.remove()
    generator = torch.Generator().manual_seed(0)
    draws = 8
    for _ in range(draws):
        labels = torch.multinomial(reference.exp().flatten(0, 1), 1, generator=generator).view(ids.shape)

        def own(network: torch.nn.Module, batch: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:
            logits = network(batch).logits
            total: torch.Tensor = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum"
            )
            return total

        sums += output_sensitivities(model, arch, [ids], own)[name] / draws
    x = inputs[0]
    gram = x.T @ x / len(x)
    noise = 0.02 * torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
    predicted = float(0.5 * (sums * (noise @ gram * noise).sum(1)).sum())
    with torch.no_grad():
        module.weight += noise
        moved = model(ids).logits.log_softmax(-1)
    measured = float((reference.exp() * (reference - moved)).sum(-1).mean())
    assert predicted == pytest.approx(measured, rel=0.5)
