from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.adapters.loss import IGNORED, TokenLoss, summed_cross_entropy, trained_tokens
from tests.tiny import tiny_model


def reference(hidden: Tensor, head: nn.Linear, target: Tensor, softcap: float | None) -> Tensor:
    """The sum of losses and its gradient by autograd, in float64 and all at once."""
    logits = hidden @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits, target, reduction="sum")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_loss_and_gradient_equal_float64(
    frozen: bool, softcap: float | None, bias: bool, chunk: int
) -> None:
    generator = torch.Generator().manual_seed(chunk)
    head = nn.Linear(12, 30, bias=bias)
    head.weight.data = torch.randn(30, 12, generator=generator)
    head.requires_grad_(not frozen)
    hidden = torch.randn(19, 12, generator=generator)
    target = torch.randint(0, 30, (19,), generator=generator)
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    loss = summed_cross_entropy(ours, head, target, softcap=softcap, chunk=chunk)
    expected = reference(exact, head, target, softcap)
    (0.37 * loss).backward()
    (0.37 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    if not frozen:
        assert head.weight.grad is not None
        assert head.weight.grad.abs().sum() > 0


def test_no_positions_cost_nothing() -> None:
    head = nn.Linear(4, 6).requires_grad_(False)
    loss = summed_cross_entropy(torch.zeros(0, 4, requires_grad=True), head, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0


def test_logits_are_never_held_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = F.linear

    def spy(x: Tensor, *rest: Any) -> Tensor:
        rows.append(x.shape[0])
        return original(x, *rest)

    monkeypatch.setattr("compress.adapters.loss.F.linear", spy)
    head = nn.Linear(4, 6).requires_grad_(False)
    summed_cross_entropy(torch.randn(20, 4), head, torch.zeros(20, dtype=torch.long), chunk=8)
    assert rows == [8, 8, 4]


@pytest.mark.parametrize(
    "kind", ["llama_gqa", "llama_tied", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"]
)
def test_token_loss_equals_hugging_face(kind: str) -> None:
    model = tiny_model(kind)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 128, (3, 11), generator=generator)
    labels = ids.clone()
    labels[0, :5] = IGNORED
    labels[2, 4] = IGNORED
    module = TokenLoss(model, chunk=4)
    loss = module(ids, labels)
    expected = model(input_ids=ids, labels=labels).loss * trained_tokens(labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert trained_tokens(labels) == 3 * 10 - 4 - 1
    assert module._separable, "the cheap path was not taken"


def test_unusual_logits_take_the_models_own_path() -> None:
    model = tiny_model("llama_gqa")
    head = model.get_output_embeddings()
    assert head is not None
    original = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        out.logits = out.logits * 0.25
        return out

    model.forward = scaled
    ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    module = TokenLoss(model)
    expected = F.cross_entropy(
        scaled(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    assert module(ids, ids).item() == pytest.approx(expected.item(), rel=1e-6)
    assert module._separable is False
