"""A saved adapter put into a model, every factor of it and every one that the model waits for."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from torch import nn

from compress.errors import CompressError, out_of_memory

_REMEDY = "Use the model that it was trained on, or save the adapter again with PEFT from that model."


def filled_adapter(model: nn.Module, config: LoraConfig, path: Path, *, trainable: bool = False) -> PeftModel:
    """The model with the adapter in ``path``, in eval mode.

    PEFT's own ``from_pretrained`` warns of factors that the file lacks, leaves them at their start (B zero: the bare
    base) and says nothing of tensors that have no place. Both are refused here.

    Args:
        model: A causal language model; it is wrapped in place.
        config: Of the adapter.
        path: Its folder.
        trainable: Whether the factors get gradients.

    Raises:
        CompressError: The adapter's modules, shapes or tensor names are not those of the model.
    """
    try:
        filled = PeftModelForCausalLM(model, config)
        found = filled.load_adapter(
            str(path),
            "default",
            is_trainable=trainable,
            key_mapping=getattr(model, "_checkpoint_conversion_mapping", {}),
        )
    except (RuntimeError, ValueError, KeyError) as error:
        if out_of_memory(error):
            raise
        raise CompressError(
            f"The adapter {path} does not fit the model: {_first_line(error)}.", _REMEDY
        ) from error
    lacking = [f"lacks {_counted(found.missing_keys)} of the model"] if found.missing_keys else []
    if found.unexpected_keys:
        lacking.append(f"has {_counted(found.unexpected_keys)} that the model has no place for")
    if lacking:
        raise CompressError(
            f"The adapter {path} does not fit the model: it {' and '.join(lacking)}.", _REMEDY
        )
    return filled


def _counted(keys: list[str]) -> str:
    """How many, and the first as a file spells it: PEFT has put its name for the adapter in between."""
    first = sorted(keys)[0].replace(".default.", ".")
    return f"{first!r}" if len(keys) == 1 else f"{len(keys)} tensors, first {first!r},"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    # of a state dict that does not fit, the first line only names the class
    text = lines[1] if len(lines) > 1 and lines[0].endswith(":") else (lines or [type(error).__name__])[0]
    return text.rstrip(".").replace(".default.", ".")
