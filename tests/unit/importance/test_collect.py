"""Driving a criterion: what is run, what is restored, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.adapters.loss import TokenLoss
from compress.errors import CompressError, UsageError
from compress.importance.base import create_criterion
from compress.importance.collect import collect
from compress.importance.modules import decoder_linear
from compress.model.architecture import Architecture
from compress.model.int8 import to_int8
from tests.tiny import tiny_model
from tests.unit.importance.common import Allocations, vectors
from tests.unit.importance.test_taylor import summed_loss, text
from tests.unit.prune.common import backward, model_architecture, with_lora


def setup(kind: str = "llama_gqa") -> tuple[Any, Architecture]:
    model = tiny_model(kind)
    return model, model_architecture(model)


@pytest.mark.parametrize("name", ["flap", "wanda", "taylor"])
@pytest.mark.parametrize("peft", [False, True])
def test_modes_flags_and_other_gradients_are_restored(name: str, peft: bool) -> None:
    model, arch = setup()
    if peft:
        model = with_lora(model, arch)
        backward(model, seed=0)
    model.train()
    model.get_submodule("base_model.model.model.norm" if peft else "model.norm").eval()
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == (2 * 7 * arch.layers if peft else 0)
    collect(create_criterion(name, arch), model, arch, text(), loss=summed_loss, batch=2)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    left = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert left.keys() == grads.keys()
    assert all(torch.equal(left[key], grad) for key, grad in grads.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gradients_exist_for_the_decoder_weights_alone() -> None:
    model, arch = setup()
    names = {arch.tensor_name(layer, spec) for layer in range(arch.layers) for spec in arch.linears}
    seen = []

    def loss(given: Any, ids: torch.Tensor) -> torch.Tensor:
        seen.append({key for key, parameter in given.named_parameters() if parameter.requires_grad})
        assert not given.training
        return summed_loss(given, ids)

    with torch.no_grad():  # the caller's mode does not matter
        collect(create_criterion("taylor", arch), model, arch, text(), loss=loss, batch=3)
    assert seen == [names, names]


def test_an_error_restores_the_model_too() -> None:
    model, arch = setup()
    model.train()

    def loss(given: Any, ids: torch.Tensor) -> torch.Tensor:
        summed_loss(given, ids).backward()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect(create_criterion("taylor", arch), model, arch, text(), loss=loss, batch=3)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["flap", "wanda", "taylor"])
def test_neither_the_batch_nor_the_order_matters(name: str) -> None:
    model, arch = setup()
    found = []
    calls: list[tuple[int, int, str]] = []
    for ids, batch in ((text(), 1), (text().flip(0), 2), (text(), 5)):
        criterion = create_criterion(name, arch)
        collect(
            criterion,
            model,
            arch,
            ids,
            loss=summed_loss,
            batch=batch,
            progress=lambda *call: calls.append(call),
        )
        found.append(vectors(criterion.scores()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=2e-3, atol=1e-6)
    assert [call[:2] for call in calls] == [*((i, 5) for i in range(1, 6)), (1, 3), (2, 3), (3, 3), (1, 1)]


def test_the_token_loss_of_training_fits() -> None:
    model, arch = setup()
    found = []
    for loss in (summed_loss, lambda given, ids: TokenLoss(given)(ids, ids)):
        criterion = create_criterion("taylor", arch)
        collect(criterion, model, arch, text(), loss=loss, batch=5)
        found.append(vectors(criterion.scores()))
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=1e-6)


def test_wrong_requests_are_named() -> None:
    model, arch = setup()
    with pytest.raises(UsageError, match="gradients of adapters"):
        collect(create_criterion("lora", arch), model, arch, text(), loss=summed_loss, batch=1)
    with pytest.raises(UsageError, match="there is no loss"):
        collect(create_criterion("taylor", arch), model, arch, text(), loss=None, batch=1)
    for ids in (text()[:0], text()[:, :1]):
        with pytest.raises(CompressError, match="Calibration got"):
            collect(create_criterion("wanda", arch), model, arch, ids, loss=None, batch=1)
    to_int8(model, arch)
    with pytest.raises(CompressError, match=r"q_proj is quantized \(int8 codes\)"):
        collect(create_criterion("taylor", arch), model, arch, text(), loss=summed_loss, batch=1)


@pytest.mark.parametrize(
    ("name", "eight_bit"),
    [
        *((name, False) for name in ("flap", "lora", "magnitude", "random", "taylor", "wanda")),
        *((name, True) for name in ("flap", "lora", "magnitude", "wanda")),  # codes have no true gradients
    ],
)
def test_observing_takes_no_memory_of_the_size_of_a_matrix(name: str, eight_bit: bool) -> None:
    model, arch = setup()
    if eight_bit:
        to_int8(model, arch)
    chunk = 256
    criterion = create_criterion(name, arch, chunk_elements=chunk)
    model = with_lora(model, arch)
    backward(model, seed=0)
    if name == "taylor":
        for layer in range(arch.layers):
            for spec in arch.linears:
                weight = decoder_linear(model, arch, layer, spec).get_submodule("base_layer").weight
                weight.grad = torch.ones_like(weight)
    if name in ("flap", "wanda"):
        with torch.no_grad(), criterion.watching(model):
            model(input_ids=text())
    with Allocations() as seen:
        criterion.observe(model)
    factors = 3 * 4 * max(arch.hidden, arch.channels) if name == "lora" else 0  # [3R, I] and [O, 3R]
    assert seen.largest <= max(chunk, factors)
    if name != "random":
        assert seen.largest >= chunk / 2
        assert criterion.scores().finite
