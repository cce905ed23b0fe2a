"""The text of a chain: named sources and files as they are, ``self`` written once by the original model."""

from __future__ import annotations

from pathlib import Path

from compress.data.identity import text_digest
from compress.data.sources import load_text
from compress.data.text import Split, Text, plain_text
from compress.model.load import load_model, load_tokenizer
from compress.pipelines.identity import TEXT
from compress.pipelines.model_input import device_and_dtype
from compress.pipelines.stage import Context
from compress.pipelines.workspace import FORMAT_VERSION, read_json, write_json


def text_inputs(source: str, *splits: Split, name: str = TEXT) -> dict[str, str]:
    """The text as an input of a stage, whose identity it changes when its content changes; see `text_digest`.

    Args:
        source: As ``--data`` takes it.
        splits: Those that the stage reads; none: train and validation, as the stages do that make something.
        name: Of the input.

    Returns:
        Empty where the content is not known beforehand.
    """
    found = text_digest(source, splits or ("train", "validation"))
    return {} if found is None else {name: found}


def read_text(context: Context, source: str, split: Split, model: Path) -> Text:
    """One split of a source.

    ``self`` is written by the chain's original model (by ``model`` where no chain has begun) and kept in the
    workspace, so that every stage reads the same text.
    """
    if source != "self":
        return load_text(source, split)
    known, seed = context.workspace.model, context.common.seed
    kept = kept_text(context.workspace.root, split, seed)
    if known is not None and kept.is_file():
        return plain_text("self", split, read_json(kept)["documents"])
    writer = model if known is None else Path(known["path"])
    device, dtype = device_and_dtype(context.common)
    with context.reporter.bar(f"{split} text by the model itself") as progress:
        text = load_text(
            "self",
            split,
            tokenizer=load_tokenizer(writer),
            model=load_model(writer, dtype=dtype, device=device),
            seed=seed,
            progress=progress,
        )
    if known is not None:
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, {"format_version": FORMAT_VERSION, "documents": list(text.documents)})
    return text


def kept_text(root: Path, split: Split, seed: int) -> Path:
    """Where a workspace keeps the text that its model wrote."""
    return root / "text" / f"self-{split}-{seed}.json"
