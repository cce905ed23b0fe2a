"""A loaded model as lm-eval's model interface. Imported only where lm-eval is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import LM

from compress.evaluate.continuation import log_likelihoods
from compress.evaluate.harness_requests import generation_of, pair_of, rolling_pairs, scored
from compress.progress import Progress


class HarnessModel(LM):
    """Answers lm-eval's requests with the scorer of ``--task``, so both give one model the same numbers.

    Its own wrapper of transformers models is not used: it ties weights again and looks the model's type up among
    those of transformers, and models whose layers differ in size are none of these.

    Args:
        model: A causal language model with its adapter, on its device.
        tokenizer: Its tokenizer.
        bos: Begin every context with BOS (a whole text begins with it anyway).
        progress: Called with requests done.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, bos: bool = False, progress: Progress | None = None
    ) -> None:
        super().__init__()
        self._network = model
        self._tokenizer = tokenizer
        self._bos = bos
        self._progress = progress
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it."""
        pairs = [
            pair_of(request.args, self._tokenizer, self._positions, bos=self._bos) for request in requests
        ]
        found = log_likelihoods(self._network, pairs, progress=self._progress)
        return [(each.log_likelihood, each.greedy) for each in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of each whole text."""
        pieces = [rolling_pairs(request.args[0], self._tokenizer, self._positions) for request in requests]
        found = log_likelihoods(
            self._network, [pair for each in pieces for pair in each], progress=self._progress
        )
        answers, at = [], 0
        for each in pieces:
            answers.append(scored(found[at : at + len(each)]))
            at += len(each)
        return answers

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedily decoded text for each prompt, one prompt at a time."""
        device = next(self._network.parameters()).device
        pad = self._tokenizer.pad_token_id
        answers = []
        for number, request in enumerate(requests, start=1):
            wanted = generation_of(request.args, self._tokenizer, self._positions, bos=self._bos)
            prompt = torch.tensor([wanted.prompt], device=device)
            stops = {"stop_strings": list(wanted.until), "tokenizer": self._tokenizer} if wanted.until else {}
            ids = self._network.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=wanted.new_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.eos_token_id if pad is None else pad,
                **stops,
            )
            text = self._tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
            answers.append(wanted.cut(text))
            if self._progress is not None:
                self._progress(number, len(requests), "answering")
        return answers
