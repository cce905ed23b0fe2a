"""The distillation loss and its gradient against autograd on whole tables of logits, float64 softmax."""

from __future__ import annotations

import pytest
import torch

from compress.adapters.attach import attach_lora
from compress.adapters.distill import DistillationLoss
from compress.adapters.train import FitConfig, fit
from compress.data.windows import Windows
from compress.model.architecture import architecture_of
from tests.tiny import DENSE, VOCAB, tiny_model

IGNORED = -100


def batch(seed: int, windows: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 0] = IGNORED
    labels[1, 5:8] = IGNORED
    return ids, labels


@pytest.mark.parametrize("kind", [*DENSE, "gpt2"])
def test_value_and_gradient_are_those_of_the_whole_divergence(kind: str) -> None:
    teacher, student = tiny_model(kind, seed=0), tiny_model(kind, seed=1)
    arch = architecture_of(student.config.to_dict())
    adapted = attach_lora(student, arch, rank=2, alpha=4, dropout=0.0, seed=3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide the gradient of A
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    ids, labels = batch(4)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}

    loss = DistillationLoss(adapted, teacher, chunk=5)(ids, labels)
    loss.backward()
    found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    adapted.zero_grad()

    chosen = labels[:, 1:] != IGNORED
    with torch.no_grad():
        target = teacher(ids, use_cache=False).logits[:, :-1][chosen].double().log_softmax(-1)
    ours = adapted(ids, use_cache=False).logits[:, :-1][chosen].double().log_softmax(-1)
    expected = (target.exp() * (target - ours)).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(found) == set(trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_model_does_not_diverge_from_itself() -> None:
    model = tiny_model("llama_gqa")
    ids, labels = batch(5)
    assert DistillationLoss(model, model)(ids, labels).item() == pytest.approx(0.0, abs=1e-4)


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
        teacher=teacher,
    )
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.validation_after is not None
    assert result.validation_after > result.losses[-1]  # the labels' own loss, not the divergence
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
