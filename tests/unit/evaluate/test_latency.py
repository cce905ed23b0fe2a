from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.evaluate import latency
from compress.evaluate.latency import throughput
from tests.tiny import tiny_model


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_counts_tokens_per_second_of_the_median_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Times of begin, prefill end, decode end: a slow warm-up, then three runs with medians 2 s and 5 s.
    times = iter([0, 100, 200, 0, 1, 9, 10, 12, 17, 20, 29, 31])
    monkeypatch.setattr(latency, "_now", lambda device: float(next(times)))
    model = tiny_model(kind).train()
    shapes: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    result = throughput(model, torch.randint(4, 128, (2, 16)), decode_tokens=10)
    handle.remove()
    assert result.prefill_tokens_per_second == pytest.approx(2 * 16 / 2)
    assert result.decode_tokens_per_second == pytest.approx(2 * 10 / 5)
    assert shapes == ([(2, 16)] + [(2, 1)] * 10) * 4
    assert (result.batch, result.prompt_tokens, result.decode_tokens, result.repeats) == (2, 16, 10, 3)
    assert (result.dtype, result.device) == ("float32", "cpu")
    assert model.training


def test_decoding_uses_the_cache_and_gives_the_greedy_tokens() -> None:
    model = tiny_model("llama_gqa")
    prompt = torch.randint(4, 128, (1, 12), generator=torch.Generator().manual_seed(0))
    steps: list[int] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        steps.append(int(kwargs["input_ids"][0, -1]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    result = throughput(model, prompt[0], decode_tokens=6, repeats=1)
    handle.remove()
    ids = prompt
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat((ids, model(input_ids=ids).logits[:, -1:].argmax(-1)), dim=1)
    assert steps[-6:] == ids[0, 12:].tolist()
    assert result.to_dict()["decode_tokens_per_second"] > 0


def test_bad_input() -> None:
    model = tiny_model("llama_gqa")
    with pytest.raises(CompressError, match="256 positions"):
        throughput(model, torch.ones(1, 240, dtype=torch.long))
    with pytest.raises(UsageError, match="nothing to time"):
        throughput(model, torch.ones(1, 0, dtype=torch.long))
