from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError, UsageError
from compress.evaluate import generation
from compress.evaluate.generation import end_ids, generate, pick
from tests.tiny import DENSE, tiny_model

PROMPT = [1, 40, 41, 42, 77, 9]


def endless(kind: str, seed: int = 0) -> Any:
    """A tiny model that no token stops."""
    model = tiny_model(kind, seed)
    model.generation_config.eos_token_id = []
    return model


@torch.inference_mode()
def without_cache(model: Any, ids: list[int], tokens: int) -> list[int]:
    """The likeliest tokens, the whole text read again for each of them."""
    text = list(ids)
    for _ in range(tokens):
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(ids) :]


@pytest.mark.parametrize("kind", [*DENSE, "gpt2"])
def test_greedy_text_is_that_of_reading_everything_again(kind: str) -> None:
    model = endless(kind)
    seen: list[list[int]] = []
    made = generate(model, PROMPT, tokens=24, each=lambda new: seen.append(list(new)))
    assert list(made.ids) == without_cache(model, PROMPT, 24)
    assert seen == [list(made.ids[: i + 1]) for i in range(24)]
    assert made.stopped == "length"


def test_an_end_of_text_token_ends_it() -> None:
    model = endless("llama_gqa")
    whole = without_cache(model, PROMPT, 12)
    end = next(token for token in whole if whole.index(token) >= 2)
    model.generation_config.eos_token_id = [126, end]
    made = generate(model, PROMPT, tokens=12)
    assert list(made.ids) == whole[: whole.index(end) + 1]
    assert made.stopped == "end"


def test_ends_are_those_of_the_generation_config_first() -> None:
    model = tiny_model("llama_mha")
    model.generation_config.eos_token_id = None
    assert end_ids(model) == {2}
    model.generation_config.eos_token_id = 7
    assert end_ids(model) == {7}
    model.generation_config.eos_token_id = [7, 9]
    assert end_ids(model) == {7, 9}


def test_draws_follow_the_probabilities_at_a_temperature() -> None:
    logits, temperature, count = torch.tensor([1.0, -0.5, 0.3, -20.0]), 0.7, 6000
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([pick(logits, temperature, generator) for _ in range(count)])
    weights = (logits.double() / temperature).exp()
    expected = weights / weights.sum()
    found = torch.bincount(drawn, minlength=4) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert (found - expected).abs().le(4 * deviation + 1e-9).all()


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=20).filter(
        lambda x: sorted(x)[-1] > sorted(x)[-2]
    ),
    st.sampled_from([0.0, 1e-40, 1e-12]),
)
def test_towards_no_temperature_it_is_the_likeliest(logits: list[float], temperature: float) -> None:
    best = max(range(len(logits)), key=logits.__getitem__)
    assert pick(torch.tensor(logits), 0.0, torch.Generator()) == best
    ahead = sorted(logits)[-1] - sorted(logits)[-2]
    if temperature == 0 or ahead / temperature > 200:
        assert pick(torch.tensor(logits), temperature, torch.Generator().manual_seed(1)) == best


def test_a_seed_decides_and_the_global_generator_is_left_alone() -> None:
    model = endless("llama_gqa")
    before = torch.get_rng_state()
    made = [generate(model, PROMPT, tokens=16, temperature=2.0, seed=seed).ids for seed in (3, 3, 4)]
    assert made[0] == made[1]
    assert made[0] != made[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_speeds_count_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.5, 16.5])  # begun, the first token known, the last token known
    monkeypatch.setattr(generation, "_now", lambda device: next(times))
    made = generate(endless("llama_gqa"), PROMPT, tokens=9)
    assert (made.prefill_seconds, made.decode_seconds) == (2.5, 4.0)
    assert made.tokens_per_second == 2.0


def test_one_token_has_no_speed() -> None:
    assert generate(endless("llama_gqa"), PROMPT, tokens=1).tokens_per_second is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(CompressError, match="not finite"):
        pick(torch.tensor([0.0, value]), 1.0, torch.Generator())


@pytest.mark.parametrize(
    "wrong", [{"ids": []}, {"tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}]
)
def test_nothing_to_generate_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="nothing to generate"):
        generate(tiny_model("llama_mha"), **{"ids": PROMPT, "tokens": 4, **wrong})
