"""Hugging Face checkpoints on disk, read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from compress.errors import CompressError
from compress.model.architecture import Architecture, architecture_of, expected_shapes
from compress.model.base_record import TensorDigest, fingerprint_of
from compress.model.config import build_config, meta_shapes, quantization_method, refuse_quantized
from compress.model.family import family_of
from compress.model.inside import require_inside
from compress.model.tensor_file import (
    DTYPE_NAMES,
    RepeatedName,
    TensorEntry,
    all_finite,
    read_header,
    unique,
)
from compress.model.uneven import is_uneven
from compress.model.writer import CheckpointWriter

__all__ = [
    "SIDE_FILES",
    "Checkpoint",
    "CheckpointWriter",
    "checkpoint_architecture",
    "copy_side_files",
    "read_config",
    "require_dense",
    "require_side_files_inside",
]

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
"""Files beside the weights that belong to a model whatever its shape."""

TEMPLATES = "additional_chat_templates"
"""Sub-folder of further chat templates."""

LONGEST_NAME, LONGEST_PATH = 255, 1024
"""Bytes of a file name on the file systems in use, and characters of a path within a model's folder."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Checkpoint:
    """A local Hugging Face folder of safetensors: config, tensor names, and each tensor on demand.

    Opening reads headers only. Tied tensors appear once, as they are stored.

    Args:
        path: The folder.

    Raises:
        CompressError: It is no folder, has no config.json, no weights or only pickled ones, an adapter beside them, or
            its index or headers are broken or lead outside the folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = read_config(self.path)
        if (self.path / "adapter_config.json").is_file():
            raise CompressError(
                f"The folder {self.path} holds an adapter beside the model; transformers would put it on unasked.",
                "Move the adapter's files to a folder of their own, or merge it.",
            )
        self._entries = _read_entries(self.path)
        self.names: tuple[str, ...] = tuple(self._entries)
        self._digests: Mapping[str, TensorDigest] | None = None
        self._not_finite: str | None = None

    def _entry(self, name: str) -> TensorEntry:
        entry = self._entries.get(name)
        if entry is None:
            raise CompressError(
                f"The checkpoint {self.path} has no tensor {name!r}.",
                "Use a checkpoint of the model it should be.",
            )
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor."""
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """The stored bytes of a tensor."""
        return self._entry(name).nbytes

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype, in memory of its own."""
        return self._entry(name).read()

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """One tensor, into memory that is there: on the CPU, contiguous, of its shape and dtype."""
        self._entry(name).read_into(target)

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, each once."""
        return tuple(dict.fromkeys(entry.file for entry in self._entries.values()))

    @property
    def parameters(self) -> int:
        """Stored elements of all tensors; for a quantized checkpoint these are packed codes, not weights."""
        return sum(entry.nbytes // entry.dtype.itemsize for entry in self._entries.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.nbytes for entry in self._entries.values())

    def digests(self) -> Mapping[str, TensorDigest]:
        """What every tensor is, by name in alphabetical order; cached. Reads every weight once."""
        if self._digests is None:
            found = {}
            for name in sorted(self._entries):
                entry = self._entries[name]
                content = hashlib.sha256()
                for piece in entry.chunks():
                    content.update(piece)
                    if self._not_finite is None and not all_finite(piece, entry.dtype):
                        self._not_finite = name
                found[name] = TensorDigest(
                    dtype=DTYPE_NAMES[entry.dtype], shape=entry.shape, sha256=content.hexdigest()
                )
            self._digests = found
        return self._digests

    def require_finite(self) -> None:
        """Refuse weights that are NaN or infinite; reads every weight once, together with :meth:`digests`.

        Raises:
            CompressError: With the first such tensor.
        """
        self.digests()
        if self._not_finite is not None:
            raise CompressError(
                f"The tensor {self._not_finite!r} of {self.path} holds values that are not finite.",
                "Check the checkpoint, or the training that produced it.",
            )

    def fingerprint(self) -> str:
        """SHA-256 over name, dtype, shape and content digest of every tensor, sorted by name; cached.

        It does not depend on sharding, and reads every weight once.
        """
        return fingerprint_of(self.digests())


def checkpoint_architecture(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a checkpoint, its tensor names (and, unless quantized, shapes) checked against it.

    Raises:
        CompressError: See `architecture_of`; also when a stored shape contradicts the config.
    """
    arch = architecture_of(checkpoint.config, checkpoint.names)
    if family_of(arch.family) is not None and not is_uneven(checkpoint.config):
        _check_the_rest(checkpoint, arch)
    if quantization_method(checkpoint.config) is None:
        for name, shape in expected_shapes(arch).items():
            found = checkpoint.shape(name)
            if found != shape:
                raise CompressError(
                    f"The tensor {name!r} has the shape {found} where the config asks for {shape}.",
                    "Use a checkpoint whose config.json belongs to its weights.",
                )
    return arch


def _check_the_rest(checkpoint: Checkpoint, arch: Architecture) -> None:
    """Norms and whatever else transformers builds beside the linears: there, and of its shape."""
    known = expected_shapes(arch)
    for name, shape in meta_shapes(build_config(checkpoint.config)).items():
        if name in known:
            continue
        if name not in checkpoint:
            raise CompressError(
                f"The checkpoint {checkpoint.path} lacks the tensor {name!r}.", "Download or write it again."
            )
        if checkpoint.shape(name) != shape:
            raise CompressError(
                f"The tensor {name!r} has the shape {checkpoint.shape(name)} where the config asks for {shape}.",
                "Use a checkpoint whose config.json belongs to its weights.",
            )


def require_dense(checkpoint: Checkpoint, *, allow_lq: bool = True) -> None:
    """Refuse a checkpoint that is stored quantized (``allow_lq``: by another method than ours).

    Raises:
        CompressError: With the method's name.
    """
    refuse_quantized(checkpoint.config, allow_lq=allow_lq)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, chat template and licence; never weights or config.

    Raises:
        CompressError: One of them is a link that leads out of the folder.
    """
    require_side_files_inside(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for file in sorted((source / TEMPLATES).glob("*.jinja")):
        (target / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, target / TEMPLATES / file.name)


def require_side_files_inside(folder: Path) -> None:
    """Refuse a folder whose tokenizer, generation config or chat template, which transformers reads, lie elsewhere.

    Raises:
        CompressError: One of them is a link that leads out of the folder.
    """
    for name in SIDE_FILES:
        if (folder / name).is_file():
            require_inside(folder, folder / name)
    for file in sorted((folder / TEMPLATES).glob("*.jinja")):
        require_inside(folder, file)


def read_config(path: Path) -> dict[str, Any]:
    """The content of a model folder's config.json.

    Raises:
        CompressError: It is no model folder, or the file is no JSON object.
    """
    if not path.is_dir():
        raise CompressError(
            f"There is no model folder {str(path)!r}.", "Give the folder that holds config.json."
        )
    file = path / "config.json"
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise CompressError(
                f"The folder {path} is an adapter, not a model.", "Give the folder of its base model."
            )
        raise CompressError(
            f"The folder {path} has no config.json.", "Give a folder written by save_pretrained."
        )
    require_inside(path, file)
    config = _read_json(file)
    if not isinstance(config, dict):
        raise CompressError(
            f"The file {file} is no JSON object.", "Restore the model's original config.json."
        )
    return config


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except RepeatedName as error:
        raise CompressError(
            f"The file {file} names {error.name!r} twice.",
            "Download it again, or do not use this checkpoint.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise CompressError(f"The file {file} is no valid JSON.", "Download or restore it again.") from error


def _read_entries(path: Path) -> dict[str, TensorEntry]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        require_inside(path, single)
        return read_header(single)[0]
    if index.is_file():
        require_inside(path, index)
        return _read_index(path, index)
    if any(file for pattern in _PICKLES for file in path.glob(pattern)):
        raise CompressError(
            f"The folder {path} holds pickled weights only, and pickles can run code, so none is ever read.",
            "Get the model's safetensors files, or convert it where you trust it, with save_pretrained.",
        )
    if any(path.glob("*.gguf")):
        raise CompressError(
            f"The folder {path} holds GGUF files only.", "Give the path of the .gguf file itself."
        )
    raise CompressError(
        f"The folder {path} has no model.safetensors.", "Give a folder with safetensors weights."
    )


def _read_index(path: Path, index: Path) -> dict[str, TensorEntry]:
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CompressError(f"The file {index} has no weight_map.", "Download it again.")
    shards: dict[str, dict[str, TensorEntry]] = {}
    for shard in sorted(set(weight_map.values())):
        if not _inside(shard):
            raise CompressError(
                f"The file {index} points to {shard!r}, which is no safetensors file inside the folder.",
                "Do not use this checkpoint, or get it from a source you trust.",
            )
        if not (path / shard).is_file():
            raise CompressError(f"The weight file {path / shard} is missing.", "Download the model again.")
        require_inside(path, path / shard)
        shards[shard] = read_header(path / shard)[0]
    entries = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CompressError(
                f"The file {path / shard} lacks the tensor {name!r}.", "Download the model again."
            )
        entries[name] = shards[shard][name]
    return entries


def _can_be_named(part: str) -> bool:
    """Whether a file can have this name at all; asking the system for one that cannot fails in many ways."""
    try:
        return "\0" not in part and len(os.fsencode(part)) <= LONGEST_NAME
    except UnicodeEncodeError:
        return False


def _inside(shard: str) -> bool:
    """Whether a shard name stays in its folder; by its parts, since hub snapshots are links to blobs."""
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    return (
        shard.endswith(".safetensors")
        and not posix.is_absolute()
        and not windows.is_absolute()
        and not windows.drive
        and ".." not in windows.parts
        and len(shard) <= LONGEST_PATH
        and all(_can_be_named(part) for part in windows.parts)
    )
