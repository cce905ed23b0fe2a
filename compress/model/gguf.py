"""GGUF files: converted once to a Hugging Face folder of bf16 safetensors, and cached."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.errors import CompressError
from compress.model.quiet import quiet_transformers
from compress.model.writer import CheckpointWriter
from compress.progress import Progress

_FORMAT = 1  # bump when the conversion's result changes
_WHOLE_DIGEST = 256 << 20  # bytes; larger files are told apart by name, size and time instead of content
_ENVIRONMENT_KEYS = ("is_local", "local_files_only", "name_or_path", "gguf_file")


def convert_gguf(file: Path, cache: Path, *, progress: Progress | None = None) -> Path:
    """The cached Hugging Face folder of a GGUF file, converted when it is not there yet.

    Weights are dequantized in float32 and stored as bfloat16. The folder appears by an atomic rename, so
    that several processes may convert the same file at once; the first to finish wins.

    Raises:
        CompressError: The file is no GGUF, or transformers cannot convert its architecture.
    """
    target = cache / "gguf" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', file.stem)}-{_key(file)}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        _convert(file, partial, progress)
        partial.chmod(0o755)  # mkdtemp's folder is private
        try:
            os.replace(partial, target)
        except OSError:
            if not target.is_dir():  # else another process was first, and its result is the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def gguf_state(file: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The dequantized state dict of a GGUF file under Hugging Face names, cast from float32 to ``dtype``."""
    return {name: tensor.to(dtype) for name, tensor in _load(file).state_dict().items()}


def _convert(file: Path, folder: Path, progress: Progress | None) -> None:
    report = progress or (lambda done, total, label: None)
    report(0, 3, f"reading {file.name}")
    model = _load(file)
    report(1, 3, "writing safetensors")
    config = _tidy_config(model.config.to_diff_dict() | {"architectures": [type(model).__name__]})
    with CheckpointWriter(folder, config=config, metadata={"source": file.name}) as writer:
        written: set[int] = set()
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() not in written:  # tied weights share their memory, and are stored once
                writer.add(name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
                written.add(tensor.data_ptr())
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    report(2, 3, "writing the tokenizer")
    _save_tokenizer(file, folder, int(config.get("max_position_embeddings") or 0))
    report(3, 3, "converted")


def _load(file: Path) -> Any:
    """The model of a GGUF file in float32: dequantizing in a narrower type would round twice."""
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise CompressError(f"The file {file} is no GGUF file.", "Download it again, or give another model.")
    with _readable(file):
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
    return model.eval()


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Reading a GGUF file quietly, with transformers' failures as one sentence."""
    try:
        # transformers draws a bar of its own here that no setting turns off
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            yield
    except (ValueError, KeyError, OSError, NotImplementedError, struct.error, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise CompressError(
            f"transformers cannot read the GGUF file {file}: {reason}.",
            "Use the model's original safetensors checkpoint instead.",
        ) from error


def _save_tokenizer(file: Path, folder: Path, context: int) -> None:
    with _readable(file):
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True
        )
        tokenizer.save_pretrained(folder)
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    for key in _ENVIRONMENT_KEYS:
        settings.pop(key, None)
    if context:
        settings["model_max_length"] = context
    settings_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tidy_config(config: dict[str, Any]) -> dict[str, Any]:
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config["dtype"] = "bfloat16"
    tidy: dict[str, Any] = _shortest_floats(config)
    return tidy


def _shortest_floats(value: Any) -> Any:
    """Spell GGUF's float32 settings as people write them: 9.999999747378752e-06 becomes 1e-05."""
    if isinstance(value, dict):
        return {key: _shortest_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortest_floats(item) for item in value]
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _key(file: Path) -> str:
    status = file.stat()
    digest = hashlib.sha256(f"{_FORMAT}:{status.st_size}:".encode())
    if status.st_size <= _WHOLE_DIGEST:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    else:
        digest.update(f"{file.resolve()}:{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
