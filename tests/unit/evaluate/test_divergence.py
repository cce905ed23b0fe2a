from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from compress.data.windows import Windows
from compress.errors import CompressError
from compress.evaluate import divergence as divergence_module
from compress.evaluate.divergence import divergence
from tests.tiny import tiny_model


def _windows(count: int, length: int, *, mask: float = 0.0) -> Windows:
    generator = torch.Generator().manual_seed(count * 100 + length)
    ids = torch.randint(4, 128, (count, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < mask, -100)
    return Windows(ids=ids, labels=labels, protocol={})


def _reference(model: Any, reference: Any, windows: Windows) -> tuple[list[list[float]], list[list[bool]]]:
    """KL and agreement of every scored position, from whole float64 logits."""
    kls, same = [], []
    with torch.no_grad():
        q_all = model.double()(input_ids=windows.ids).logits.softmax(-1)
        p_all = reference.double()(input_ids=windows.ids).logits.softmax(-1)
    model.float(), reference.float()
    for q_SV, p_SV, labels in zip(q_all, p_all, windows.labels, strict=True):
        at = [i - 1 for i in range(1, len(labels)) if labels[i] != -100]
        kls.append([float((p_SV[i] * (p_SV[i] / q_SV[i]).log()).sum()) for i in at])
        same.append([bool(p_SV[i].argmax() == q_SV[i].argmax()) for i in at])
    return kls, same


@pytest.mark.parametrize("kind", ["llama_gqa", "gemma2"])
@pytest.mark.parametrize("mask", [0.0, 0.6])
def test_agrees_with_float64(kind: str, mask: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence_module, "CHUNK_ELEMENTS", 128 * 5)  # several chunks a window
    reference, model = tiny_model(kind, seed=0), tiny_model(kind, seed=0)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    windows = _windows(5, 24, mask=mask)
    kls, same = _reference(model, reference, windows)
    found = divergence(model.train(), reference, windows)
    assert model.training
    assert not reference.training
    flat = [value for window in kls for value in window]
    assert found.kl == pytest.approx(sum(flat) / len(flat), rel=1e-4)
    assert 0 < found.agreement < 1
    assert found.agreement == sum(map(sum, same)) / len(flat)
    assert (found.tokens, found.windows) == (len(flat), 5)
    if mask == 0:
        means = [sum(window) / len(window) for window in kls]
        expected = stats.t.interval(0.95, 4, loc=sum(means) / 5, scale=stats.sem(means))
        assert found.kl_interval == pytest.approx(tuple(map(float, expected)), rel=1e-3)
        shares = [sum(window) / len(window) for window in same]
        assert found.agreement_standard_error == pytest.approx(float(stats.sem(shares)), rel=1e-9)


def test_the_direction_is_reference_to_model() -> None:
    a, b, windows = tiny_model("llama_gqa", 0), tiny_model("llama_gqa", 1), _windows(2, 16)
    there, back = divergence(a, b, windows).kl, divergence(b, a, windows).kl
    assert there != pytest.approx(back, rel=1e-3)
    kls, _ = _reference(a, b, windows)
    assert there == pytest.approx(sum(map(sum, kls)) / 30, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_itself(dtype: torch.dtype) -> None:
    model = tiny_model("qwen3").to(dtype)
    found = divergence(model, tiny_model("qwen3").to(dtype), _windows(3, 20))
    assert (found.kl, found.agreement) == (0.0, 1.0)


def test_a_token_that_both_rule_out_costs_nothing() -> None:
    models = [tiny_model("llama_mha", seed) for seed in (0, 1)]
    windows = _windows(2, 12)
    for model in models:
        model.lm_head.register_forward_hook(
            lambda _, __, out: out.index_fill(-1, torch.tensor([7]), -torch.inf)
        )
    with torch.no_grad():
        q, p = (
            torch.cat(
                [m(input_ids=windows.ids).logits[..., :7], m(input_ids=windows.ids).logits[..., 8:]], -1
            )
            .double()
            .log_softmax(-1)[:, :-1]
            for m in models
        )
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert divergence(models[0], models[1], windows).kl == pytest.approx(expected, rel=1e-4)


def test_other_vocabularies_are_refused() -> None:
    model, other = tiny_model("llama_mha"), tiny_model("llama_mha")
    other.resize_token_embeddings(120)
    with pytest.raises(CompressError, match=r"predicts 120 tokens and the reference 128"):
        divergence(other, model, _windows(1, 8))


def test_predictions_that_are_not_finite_are_named() -> None:
    model, broken = tiny_model("llama_mha"), tiny_model("llama_mha")
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    with pytest.raises(CompressError, match="not finite in window 0"):
        divergence(broken, model, _windows(2, 8))
    nothing = Windows(ids=torch.ones(1, 4, dtype=torch.long), labels=torch.full((1, 4), -100), protocol={})
    with pytest.raises(CompressError, match="no token to compare"):
        divergence(model, model, nothing)


def test_logits_of_one_window_are_in_memory_at_a_time() -> None:
    model, reference, windows = tiny_model("llama_mha"), tiny_model("llama_mha", 1), _windows(4, 16)
    alive: list[Any] = []
    peak = []

    def note(_: Any, __: Any, out: torch.Tensor) -> None:
        import weakref

        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(out))
        peak.append(len(alive))

    for each in (model, reference):
        each.lm_head.register_forward_hook(note)
    divergence(model, reference, windows)
    assert len(peak) == 8
    assert max(peak) == 2
