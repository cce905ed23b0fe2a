"""The model card (README.md) of an export: what it is, how good it measured, how to load it, how it was made."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from compress.model.inside import require_inside
from compress.report.stages import headline
from compress.report.values import fixed, size

FILE_NAME = "README.md"
TAGS = {"prune": "pruned", "align": "pruned", "quantize": "quantized", "train": "lora", "recover": "lora"}
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a card is about.

    Attributes:
        base: Public name of the model the chain began with.
        what: Name of the model in the chain ("quantized").
        folder: Files that are exported.
        stages: Records of the stages that led to it, in order.
        rows: Of the chain's last evaluation; empty without one.
        loads: ``transformers``, ``compress`` (transformers after ``import compress``), ``uneven``
            (``compress.load_model``), ``peft`` (an adapter), or ``small`` (a model with its adapter in a folder).
        license: Of the base, as its card names it; None where that is not known.
    """

    base: str
    what: str
    folder: Path
    stages: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]
    loads: str
    license: str | None


def card(subject: Subject) -> str:
    """The text of the card, metadata first."""
    name = subject.base.rpartition("/")[2]
    parts = [
        f"# {name}, {_title(subject)}",
        _story(subject),
        "## Load it\n\n" + _loading(subject),
        _measured(subject),
        "## How it was made\n\n" + _commands(subject),
        "## Before you use it\n\n"
        f"The licence and the limits of {subject.base} hold for this model too. Compression changes what a model "
        "writes; what stands in a table here was measured, and nothing else was.",
    ]
    return f"---\n{_metadata(subject)}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def license_of(folder: Path) -> str | None:
    """The licence that the card in a model folder names; None without a card or a name in it.

    Raises:
        CompressError: The card is a link that leads out of the folder.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    require_inside(folder, file)
    front = _FRONT.match(file.read_text(encoding="utf-8", errors="replace"))
    try:
        found = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    name = found.get("license") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def _metadata(subject: Subject) -> str:
    verbs = [str(stage["verb"]) for stage in subject.stages]
    relation = "adapter" if subject.loads == "peft" else "quantized" if "quantize" in verbs else "finetune"
    data = ModelCardData(
        base_model=subject.base if "/" in subject.base else None,
        base_model_relation=relation if "/" in subject.base else None,
        library_name="peft" if subject.loads == "peft" else "transformers",
        pipeline_tag="text-generation",
        license=subject.license,
        tags=["compress", *dict.fromkeys(TAGS[verb] for verb in verbs if verb in TAGS)],
    )
    return str(data.to_yaml())


def _title(subject: Subject) -> str:
    words = {
        "pruned": "pruned",
        "aligned": "pruned and aligned",
        "quantized": "quantized",
        "trained": "small, with its adapter",
        "recovered": "an adapter trained on a smaller model",
    }[subject.what]
    merged = subject.what == "recovered" and subject.loads != "peft"
    return "with an adapter merged in that was trained on a smaller model" if merged else words


def _story(subject: Subject) -> str:
    lines = [
        f"{number}. `{stage['verb']}`: {headline(str(stage['verb']), stage['metrics'])}"
        for number, stage in enumerate(subject.stages, start=1)
    ]
    files = [file for file in subject.folder.rglob("*.safetensors") if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    start = f"Made from {subject.base} with compress (the Python package compress-llm)"
    return "\n".join([f"{start}. Weight files: {size(total)}.", "", *lines])


_SNIPPETS = {
    "transformers": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{here}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{here}")
```""",
    "compress": """The weights are stored in a format that `import compress` teaches transformers:

```python
import compress
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{here}")
tokenizer = AutoTokenizer.from_pretrained("{here}")
```""",
    "uneven": """Its layers differ in size, so this package opens it:

```python
import compress

model = compress.load_model("{here}")
tokenizer = compress.load_tokenizer("{here}")
```""",
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(model, "{here}")
```""",
    "small": """The model lies in this folder, the adapter that was trained on it in `adapter/`:

```python
from pathlib import Path

import compress
from compress.adapters.attach import load_adapter

model = compress.load_model("{here}")
model = load_adapter(model, Path("{here}") / "adapter")
tokenizer = compress.load_tokenizer("{here}")
```""",
}


def _loading(subject: Subject) -> str:
    return _SNIPPETS[subject.loads].format(here="path/to/this-folder", base=subject.base)


def _measured(subject: Subject) -> str:
    if not subject.rows:
        return ""
    lines = [
        "## Measured",
        "",
        "| model | perplexity | weights | KL from the original |",
        "|---|---|---|---|",
    ]
    for row in subject.rows:
        divergence = (row.get("divergence") or {}).get("kl")
        lines.append(
            f"| {row['name']} | {fixed(row['perplexity'])} | {size(row['bytes'])} | "
            f"{'' if divergence is None else fixed(divergence, 3)} |"
        )
    protocols = dict.fromkeys(str(row["protocol_line"]) for row in subject.rows)
    return "\n".join([*lines, "", *(f"Perplexity: {line}" for line in protocols)])


def _commands(subject: Subject) -> str:
    lines = list(dict.fromkeys(_portable(stage.get("command") or []) for stage in subject.stages))
    versions = dict(subject.stages[-1].get("versions") or {})
    known = ", ".join(
        f"{name} {versions[name]}" for name in ("compress", "torch", "transformers") if name in versions
    )
    return "```\n" + "\n".join(lines) + "\n```" + (f"\n\nWith {known}." if known else "")


def _portable(words: Sequence[Any]) -> str:
    """A command line without the folders of the machine it ran on."""
    return shlex.join(_last(str(word)) for word in words)


def _last(word: str) -> str:
    option, equals, value = word.partition("=")
    if equals and option.startswith("--") and Path(value).is_absolute():
        return f"{option}={Path(value).name}"
    return Path(word).name if Path(word).is_absolute() else word
