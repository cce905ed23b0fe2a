from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.evaluate.continuation import Pair, encode_pair, log_likelihoods
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.data.test_extent import word_tokenizer

KINDS = ["llama_gqa", "gemma2", "gpt2"]


def one_by_one(model: Any, pair: Pair) -> tuple[float, bool]:
    """Log-likelihood and greediness in float64, a whole forward pass for every token."""
    total, greedy = 0.0, True
    ids = list(pair.context)
    model = model.double()
    for token in pair.continuation:
        with torch.no_grad():
            row = model(input_ids=torch.tensor([ids])).logits[0, -1].tolist()
        top = max(row)
        total += row[token] - top - math.log(sum(math.exp(value - top) for value in row))
        greedy = greedy and row.index(top) == token
        ids.append(token)
    model.float()
    return total, greedy


def some_pairs(model: Any, count: int) -> list[Pair]:
    """Pairs of many lengths, some with one input, some continued as the model would."""
    rng = random.Random(3)
    pairs = []
    for n in range(count):
        context = tuple(rng.randrange(4, 128) for _ in range(rng.randrange(1, 40)))
        if n % 3 == 0:
            ids = list(context)
            for _ in range(2):
                with torch.no_grad():
                    ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            pairs.append(Pair(context=context, continuation=tuple(ids[len(context) :])))
            continue
        continuation = tuple(rng.randrange(4, 128) for _ in range(rng.randrange(1, 6)))
        pairs.append(Pair(context=context, continuation=continuation))
        pairs.append(Pair(context=context, continuation=(rng.randrange(4, 128),)))
        pairs.append(Pair(context=context, continuation=(rng.randrange(4, 128),)))
    return pairs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [1, 90, 10_000])
def test_batches_agree_with_one_token_at_a_time(kind: str, batch_tokens: int) -> None:
    model = tiny_model(kind)
    pairs = some_pairs(model, 12)
    found = log_likelihoods(model.train(), pairs, batch_tokens=batch_tokens)
    assert model.training
    model.eval()
    expected = [one_by_one(model, pair) for pair in pairs]
    assert [each.log_likelihood for each in found] == pytest.approx([e[0] for e in expected], rel=1e-5)
    assert [each.greedy for each in found] == [e[1] for e in expected]
    assert sum(each.greedy for each in found) >= 4
    assert [each.tokens for each in found] == [len(pair.continuation) for pair in pairs]


def test_one_input_is_read_once_and_batches_hold_few_tokens() -> None:
    model = tiny_model("llama_gqa")
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    context = tuple(range(10, 30))
    choices = [Pair(context=context, continuation=(token,)) for token in (40, 41, 42)]
    long = Pair(context=tuple(range(4, 100)), continuation=(5, 6))
    found = log_likelihoods(model, [*choices, long], batch_tokens=64)
    assert shapes == [(1, 97), (1, 20)]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([context])).logits[0, -1].log_softmax(-1)
    assert [f.log_likelihood for f in found[:3]] == pytest.approx(log_p[40:43].tolist(), rel=1e-5)


def test_only_the_logits_that_are_scored_are_computed() -> None:
    model, widths = tiny_model("llama_gqa"), []
    model.lm_head.register_forward_hook(lambda _, __, out: widths.append(out.shape[1]))
    log_likelihoods(model, [Pair(context=tuple(range(10, 60)), continuation=(7, 8, 9))])
    assert widths == [3]


TEXTS = st.text(st.sampled_from("ab \n."), max_size=12)


@given(TEXTS, TEXTS.filter(lambda text: text.strip(" ") != ""))
def test_tokens_of_the_whole_after_those_of_the_context(context: str, continuation: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "<unk>"
    bare = context.rstrip()
    expected = tokenizer(bare, add_special_tokens=False)["input_ids"] if bare else [tokenizer.bos_token_id]
    whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    scored = whole[len(expected) if bare else 0 :]
    if not scored:  # the last token of the context swallowed the continuation
        with pytest.raises(CompressError, match="adds no token"):
            encode_pair(context, continuation, tokenizer)
        return
    pair = encode_pair(context, continuation, tokenizer)
    assert (list(pair.context), list(pair.continuation)) == (expected, scored)
    assert not pair.truncated


def test_a_space_at_the_end_of_the_context_goes_to_the_word_after_it() -> None:
    tokenizer = word_tokenizer()
    pair = encode_pair("b ", "ab", tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(pair.context)) == ["b"]
    assert tokenizer.convert_ids_to_tokens(list(pair.continuation)) == ["Ġab"]
    assert pair == encode_pair("b", " ab", tokenizer)


def test_a_long_context_loses_its_start() -> None:
    tokenizer = tiny_tokenizer()
    pair = encode_pair("abcdefgh", "xyz", tokenizer, positions=6)
    assert tokenizer.decode(pair.context) == "efgh"
    assert len(pair.inputs) == 6
    assert pair.truncated
    assert not encode_pair("efgh", "xyz", tokenizer, positions=6).truncated
    assert len(encode_pair("abc", "uvwxyz", tokenizer, positions=6).context) == 1
    begun = encode_pair("abcdefgh", "xyz", tokenizer, positions=6, bos=True)
    assert begun.truncated
    assert begun.context == (tokenizer.bos_token_id, *pair.context[1:])
    whole = encode_pair("ab", "xyz", tokenizer, positions=6, bos=True)
    assert (whole.context, whole.truncated) == ((tokenizer.bos_token_id, *tokenizer("ab").input_ids), False)
    assert encode_pair("", "ab", tokenizer, bos=True) == encode_pair("", "ab", tokenizer)
    with pytest.raises(CompressError, match="7 tokens is longer than the model's 6 positions"):
        encode_pair("abc", "tuvwxyz", tokenizer, positions=6)


def test_an_empty_context_begins_with_bos_or_eos() -> None:
    tokenizer = tiny_tokenizer()
    assert encode_pair("", "ab", tokenizer).context == (tokenizer.bos_token_id,)
    tokenizer.bos_token = None
    assert encode_pair("  ", "ab", tokenizer).context == (tokenizer.eos_token_id,)
    assert tokenizer.decode(encode_pair("  ", "ab", tokenizer).continuation) == "  ab"
    tokenizer.eos_token = None
    with pytest.raises(CompressError, match="neither a BOS nor an EOS"):
        encode_pair("", "ab", tokenizer)
    with pytest.raises(CompressError, match="adds no token"):
        encode_pair("ab", "", tokenizer)


def test_foreign_tokens_and_broken_models_are_refused() -> None:
    model = tiny_model("llama_mha")
    with pytest.raises(CompressError, match="Token 128 is outside"):
        log_likelihoods(model, [Pair(context=(4,), continuation=(128,))])
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(CompressError, match="not finite"):
        log_likelihoods(model, [Pair(context=(4,), continuation=(6,))])
    assert log_likelihoods(model, []) == []
