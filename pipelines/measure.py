"""Quick measurements inside a stage: perplexity on the validation text, before and after.

Stages look at validation text only; the test text is read by ``compress eval`` alone.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.adapters.loss import TokenLoss
from compress.data.stream import conversation_stream
from compress.data.windows import Draw, Windows, token_windows
from compress.errors import CompressError, UsageError
from compress.evaluate.perplexity import perplexity
from compress.evaluate.protocol import protocol_line
from compress.model.checkpoint import read_config
from compress.model.config import build_config
from compress.model.load import load_tokenizer
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import LoopSettings
from compress.pipelines.stage import Context
from compress.pipelines.text import read_text
from compress.pipelines.way import WHOLE, Way
from compress.pipelines.workspace import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOWS = {"quick": 8, "standard": 32, "paper": 64}
LENGTH = 512
MEASURES = "measured"
"""Sub-folder of unfinished work with what was measured already."""
CALIBRATION_SEED = 1_000_003


def training_windows(
    context: Context, model: Path, source: str, settings: LoopSettings, *, offset: int = 0
) -> Windows:
    """The windows that training reads, drawn from the source's training split.

    Args:
        context: Gives the seed.
        model: Folder of the model that will read them.
        source: Text source.
        settings: Give the number of windows and their length.
        offset: Added to the seed of the draw, so that two trainings of one stage read different windows.
    """
    tokenizer = load_tokenizer(model)
    text = read_text(context, source, "train", model)
    count = max(1, settings.steps * settings.micro_batch * settings.accumulation)
    return token_windows(
        text,
        tokenizer,
        length=settings.sequence,
        count=count,
        seed=context.common.seed + offset,
        option="--sequence",
    )


def calibration_windows(
    context: Context, model: Path, source: str, *, tokens: int, apart_from: int | None = None
) -> Windows:
    """About ``tokens`` tokens of the training split, drawn under a seed that no training uses.

    Args:
        context: Gives the seed.
        model: Folder of the model that will read them.
        source: Text source.
        tokens: How many; rounded down to whole windows, but at least one.
        apart_from: Draw windows that the calibration on so many tokens does not read, as long as there are some; see
            :func:`compress.data.windows.token_windows`.

    Returns:
        Fewer where there is not so much text. No padding: conversations follow one another.
    """
    tokenizer = load_tokenizer(model)
    text = read_text(context, source, "train", model)
    length = min(LENGTH, positions(model))
    count, seed, apart = max(1, tokens // length), context.common.seed + CALIBRATION_SEED, None
    known = 0 if apart_from is None else max(1, apart_from // length)
    if text.conversations:
        return conversation_stream(text, tokenizer, length=length, count=count, seed=seed, after=known)
    if apart_from is not None:
        apart = Draw(seed=seed, count=known)
        seed += CALIBRATION_SEED
    return token_windows(text, tokenizer, length=length, count=count, seed=seed, apart=apart)


def full_calibration(context: Context, model: Path, source: str, *, tokens: int) -> Windows:
    """The same, all of them.

    Raises:
        CompressError: There is not so much text.
    """
    windows = calibration_windows(context, model, source, tokens=tokens)
    count, length = windows.ids.shape
    if count < max(1, tokens // length):
        raise CompressError(
            f"The training split of {source} fills {count} windows of {length} tokens; "
            f"calibration asks for {tokens} tokens.",
            f"Give a longer text, or --calibration-tokens {count * length}.",
        )
    return windows


def windows_record(windows: Windows) -> dict[str, Any]:
    """What a stage records of the windows it was calibrated on: their protocol, and ``ids_sha256`` of their tokens."""
    ids = windows.ids.contiguous().numpy().astype("<i8")
    return {**windows.protocol, "ids_sha256": hashlib.sha256(ids.tobytes()).hexdigest()}


def validation_windows(
    context: Context, model: Path, source: str, *, length: int = LENGTH, option: str | None = None
) -> Windows:
    """The first windows of the source's validation split, no longer than the model's positions."""
    effort = context.common.effort or "quick"
    tokenizer = load_tokenizer(model)
    text = read_text(context, source, "validation", model)
    return token_windows(
        text, tokenizer, length=min(length, positions(model)), count=WINDOWS[effort], option=option
    )


def positions(model: Path) -> int:
    """Most tokens that the model in a folder can read at once."""
    config = build_config(read_config(model))
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def check_length(model: Path, length: int, *, whose: str = "the model's") -> None:
    """Refuse windows that the model cannot read; ``whose`` is how the message calls it.

    Raises:
        UsageError: ``length`` is above the model's positions.
    """
    if length > positions(model):
        raise UsageError(
            f"Windows of {length} tokens are longer than {whose} {positions(model)} positions.",
            f"Give --sequence {positions(model)} or less.",
        )


def measured_once(path: Path, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """JSON values that ``measure`` returns, kept in ``path`` for a run that goes on after an interruption."""
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_json(path, measure())
    return read_json(path)


def validation_perplexity(
    context: Context, network: PreTrainedModel, windows: Windows, label: str
) -> dict[str, Any]:
    """Perplexity of ``network`` as JSON values with its protocol."""
    with context.reporter.bar(f"perplexity of {label}") as progress:
        result = perplexity(network, windows, progress=progress)
    return {
        "perplexity": result.value,
        "standard_error": result.standard_error,
        "protocol": dict(result.protocol),
        "protocol_line": protocol_line(result.protocol),
    }


def known_perplexity(
    context: Context,
    model: ModelInput,
    windows: Windows,
    dtype: torch.dtype,
    device: str,
    way: Way = WHOLE,
) -> dict[str, Any]:
    """Perplexity of a stage's input: what the stage that made it measured, when on the same protocol."""
    for stage in context.workspace.stages:
        after = stage.record["metrics"].get("after", {})
        if stage.id == model.id and after.get("protocol") == expected_protocol(windows, dtype, device):
            return {key: after[key] for key in ("perplexity", "standard_error", "protocol", "protocol_line")}
    return validation_perplexity(
        context, way.open(model.path, dtype=dtype, device=device), windows, "its input"
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


def summed_loss(network: nn.Module) -> Callable[[nn.Module, Tensor], Tensor]:
    """Summed next-token loss of a batch without its full table of logits."""
    token_loss = TokenLoss(network)

    def loss(_: nn.Module, ids_BS: Tensor) -> Tensor:
        total: Tensor = token_loss(ids_BS, ids_BS)
        return total

    return loss
