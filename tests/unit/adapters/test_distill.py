"""The distillation loss and its gradient against autograd on whole tables of logits, float64 softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.adapters.attach import attach_lora
from compress.adapters.distill import Distillation, DistillationLoss
from compress.adapters.train import FitConfig, fit
from compress.data.windows import Windows
from compress.errors import CompressError, UsageError
from compress.model.architecture import architecture_of
from tests.tiny import DENSE, VOCAB, tiny_model

IGNORED = -100


def batch(seed: int, windows: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 0] = IGNORED
    labels[1, 5:8] = IGNORED
    return ids, labels


def last_layer(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The last decoder layer's own output."""
    body = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()
    layers = body.layers if hasattr(body, "layers") else body.h
    found = []
    handle = layers[-1].register_forward_hook(
        lambda _, __, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    model(ids, use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize(("share", "features"), [(0.0, 0.0), (0.3, 0.0), (0.3, 0.7)])
@pytest.mark.parametrize("kind", [*DENSE, "gpt2"])
def test_value_and_gradient_are_those_of_whole_tables(kind: str, share: float, features: float) -> None:
    teacher, student = tiny_model(kind, seed=0), tiny_model(kind, seed=1)
    arch = architecture_of(student.config.to_dict())
    adapted = attach_lora(student, arch, rank=2, alpha=4, dropout=0.0, seed=3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the gradient of A
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    ids, labels = batch(4)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}

    towards = Distillation(teacher=teacher, text_share=share, feature_weight=features)
    loss = DistillationLoss(adapted, towards, chunk=5)(ids, labels)
    loss.backward()
    found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    adapted.zero_grad()

    chosen = labels[:, 1:] != IGNORED
    with torch.no_grad():
        given = teacher(ids, use_cache=False, output_hidden_states=True)
    own = adapted(ids, use_cache=False, output_hidden_states=True)
    target = given.logits[:, :-1][chosen].double().log_softmax(-1)
    ours = own.logits[:, :-1][chosen].double().log_softmax(-1)
    text = ours.gather(1, labels[:, 1:][chosen][:, None]).sum()
    expected = (1 - share) * (target.exp() * (target - ours)).sum() - share * text
    if features:
        # without the input of the first layer; the last entry is normed, so it is taken from the layer itself
        pairs = [*zip(own.hidden_states[1:-1], given.hidden_states[1:-1], strict=True)]
        pairs.append((last_layer(adapted, ids), last_layer(teacher, ids).detach()))
        parts = [
            (a[:, :-1][chosen] - b[:, :-1][chosen]).square().sum() / b[:, :-1][chosen].square().sum()
            for a, b in pairs
        ]
        expected = expected + features * torch.stack(parts).mean() * chosen.sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(found) == set(trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_model_does_not_diverge_from_itself() -> None:
    model = tiny_model("llama_gqa")
    ids, labels = batch(5)
    assert DistillationLoss(model, Distillation(teacher=model))(ids, labels).item() == pytest.approx(
        0.0, abs=1e-4
    )


def test_fit_moves_a_student_towards_its_teacher_and_leaves_the_teacher_alone() -> None:
    teacher, student = tiny_model("llama_gqa", seed=0), tiny_model("llama_gqa", seed=0)
    arch = architecture_of(student.config.to_dict())
    with torch.no_grad():
        for layer in range(arch.layers):
            student.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight.mul_(0.3)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    adapted = attach_lora(student, arch, rank=8, alpha=16, dropout=0.0, seed=1)
    ids, labels = batch(6, windows=16, length=24)
    windows = Windows(ids=ids, labels=labels, protocol={})
    result = fit(
        adapted,
        windows,
        FitConfig(steps=30, micro_batch=8, lr=5e-3, precision="float32"),
        validation=windows,
        distillation=Distillation(teacher=teacher),
    )
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.validation_after is not None
    assert result.validation_after > result.losses[-1]  # the labels' own loss, not the divergence
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_what_cannot_be_distilled_is_refused() -> None:
    model, other = tiny_model("llama_gqa"), tiny_model("gpt2")
    with pytest.raises(UsageError, match="text share"):
        Distillation(teacher=model, text_share=1.0)
    if len(model.model.layers) == len(other.transformer.h):
        model.model.layers.append(model.model.layers[0])
    with pytest.raises(CompressError, match="cannot be compared"):
        DistillationLoss(model, Distillation(teacher=other, feature_weight=0.1))
