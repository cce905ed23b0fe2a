from __future__ import annotations

import pytest
import torch

from compress.data.sampled import _continue, split_of_sample
from compress.data.sources import load_text
from compress.data.text import SPLITS
from compress.errors import CompressError
from tests.tiny import tiny_model, tiny_tokenizer


def test_sampled_splits_are_disjoint_and_repeatable() -> None:
    model, tokenizer = tiny_model("llama_gqa"), tiny_tokenizer()
    calls: list[tuple[int, int, str]] = []
    texts = {
        split: load_text(
            "self",
            split,
            tokenizer=tokenizer,
            model=model,
            tokens=600,
            seed=4,
            progress=lambda *call: calls.append(call),
        )
        for split in SPLITS
    }
    for split, text in texts.items():
        assert all(split_of_sample(document) == split for document in text.documents)
    assert not set(texts["train"].documents) & set(texts["test"].documents)
    assert calls[-1] == (600, 600, "sampling text")
    again = load_text("self", "test", tokenizer=tokenizer, model=model, tokens=600, seed=4)
    assert again.sha256 == texts["test"].sha256
    other = load_text("self", "test", tokenizer=tokenizer, model=model, tokens=600, seed=5)
    assert other.sha256 != again.sha256


def test_sampling_follows_the_model_s_own_distribution() -> None:
    """The tokens drawn with the cache have the probabilities of an uncached forward pass."""
    model = tiny_model("llama_gqa")
    begin = torch.full((4000, 2), 7)
    with torch.no_grad():
        drawn = _continue(model, begin, 2, -1, torch.Generator().manual_seed(0))
        second = drawn[:, 3][drawn[:, 2] == (common := int(drawn[:, 2].mode().values))]
        expected = model(torch.tensor([[7, 7, common]])).logits[0, -1].double().softmax(-1)
    observed = torch.bincount(second, minlength=128).double() / len(second)
    noise = (expected * (1 - expected) / len(second)).sqrt()
    assert len(second) > 100
    assert bool(((observed - expected).abs() <= 5 * noise + 3 / len(second)).all())


def test_rows_stop_at_eos() -> None:
    model = tiny_model("llama_gqa")
    with torch.no_grad():
        model.lm_head.weight[2] += 0.2 * model.lm_head.weight.abs().mean() + 0.3
        drawn = _continue(model, torch.full((64, 1), 1), 40, 2, torch.Generator().manual_seed(1))
    ended = 0
    for row in drawn[:, 1:].tolist():
        if 2 in row:
            ended += 1
            assert set(row[row.index(2) :]) == {2}
    assert ended > 0


def test_no_token_to_start_from_and_a_silent_model() -> None:
    model, tokenizer = tiny_model("llama_gqa"), tiny_tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # uniform logits, and then only the first 4 ids, the special ones
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[:4] = 10.0
    with pytest.raises(CompressError, match="no new text"):
        load_text("self", "train", tokenizer=tokenizer, model=model, tokens=100)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(CompressError, match="neither a BOS nor an EOS"):
        load_text("self", "train", tokenizer=tokenizer, model=model, tokens=100)
