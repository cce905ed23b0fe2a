"""Quick measurements inside a stage: perplexity on the validation text, before and after.

Stages look at validation text only; the test text is read by ``compress eval`` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import TrainingSettings
from compress.pipelines.stage import Context
from transformers import PreTrainedModel

from compress.data.sources import load_text
from compress.data.windows import Windows, token_windows
from compress.evaluate.perplexity import perplexity
from compress.evaluate.protocol import protocol_line
from compress.model.load import load_model, load_tokenizer

WINDOWS = {"quick": 8, "standard": 32, "paper": 64}
LENGTH = 512


def training_windows(
    context: Context, model: Path, source: str, settings: TrainingSettings, *, offset: int = 0
) -> Windows:
    """The windows that training reads, drawn from the source's training split.

    Args:
        context: Gives the seed.
        model: Folder of the tokenizer (and, for the source ``self``, of the model that writes the text).
        source: Text source.
        settings: Give the number of windows and their length.
        offset: Added to the seed of the draw, so that two trainings of one stage read different windows.
    """
    tokenizer = load_tokenizer(model)
    loaded = load_model(model) if source == "self" else None
    text = load_text(source, "train", tokenizer=tokenizer, model=loaded, seed=context.common.seed)
    count = max(1, settings.steps * settings.micro_batch * settings.accumulation)
    return token_windows(
        text, tokenizer, length=settings.sequence, count=count, seed=context.common.seed + offset
    )


def validation_windows(
    context: Context, tokenizer_path: Path, source: str, *, length: int = LENGTH
) -> Windows:
    """The first windows of the source's validation split."""
    effort = context.common.effort or "quick"
    tokenizer = load_tokenizer(tokenizer_path)
    text = load_text(source, "validation", tokenizer=tokenizer, seed=context.common.seed)
    return token_windows(text, tokenizer, length=length, count=WINDOWS[effort])


def validation_perplexity(
    context: Context, network: PreTrainedModel, windows: Windows, label: str
) -> dict[str, Any]:
    """Perplexity of ``network`` as JSON values with its protocol."""
    with context.reporter.bar(f"perplexity of {label}") as progress:
        result = perplexity(network, windows, batch_size=4, progress=progress)
    return {
        "perplexity": result.value,
        "standard_error": result.standard_error,
        "protocol": dict(result.protocol),
        "protocol_line": protocol_line(result.protocol),
    }


def known_perplexity(
    context: Context, model: ModelInput, windows: Windows, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Perplexity of a stage's input: what the stage that made it measured, when on the same protocol."""
    for stage in context.workspace.stages:
        after = stage.record["metrics"].get("after", {})
        if stage.id == model.id and after.get("protocol") == expected_protocol(windows, dtype, device):
            return {key: after[key] for key in ("perplexity", "standard_error", "protocol", "protocol_line")}
    return validation_perplexity(
        context, load_model(model.path, dtype=dtype, device=device), windows, "its input"
    )


def expected_protocol(windows: Windows, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The protocol a perplexity over ``windows`` would carry."""
    scored = int((windows.labels[:, 1:] != -100).sum())
    return {
        "model": None,
        **windows.protocol,
        "tokens_scored": scored,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.device(device).type,
    }
