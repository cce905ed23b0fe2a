"""A checkpoint that is not there: names, shapes and dtypes from a config, or from what a cut would leave."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from compress.errors import CompressError
from compress.model.architecture import Architecture, architecture_of, expected_shapes
from compress.model.checkpoint import Checkpoint, read_config
from compress.model.config import build_config, meta_shapes, shallow_config
from compress.model.family import family_of
from compress.model.layout import Shapes
from compress.model.load import INDEX_FILE, resolve_headers
from compress.model.tensor_file import DTYPES, TensorEntry
from compress.model.uneven import is_uneven, plain_config

Source = Literal["headers", "index", "config"]
"""Where sizes come from: safetensors headers, an index without its shards, or a config alone."""

_TORCH_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


class PlannedCheckpoint(Checkpoint):
    """What `Checkpoint` tells of a folder, of weights that nobody has written.

    Args:
        path: Where the model would be, or its config is.
        config: The content of config.json.
        shapes: Shape of every tensor by name, a tied matrix once.
        dtypes: Stored dtype of every tensor by name.
    """

    def __init__(
        self, path: Path, *, config: Mapping[str, Any], shapes: Shapes, dtypes: Mapping[str, torch.dtype]
    ) -> None:
        self.path = path
        self.config = dict(config)
        self._entries = {
            name: TensorEntry(
                file=path,
                offset=0,
                nbytes=math.prod(shape) * dtypes[name].itemsize,
                dtype=dtypes[name],
                shape=shape,
            )
            for name, shape in shapes.items()
        }
        self.names = tuple(self._entries)
        self._digests = None

    def read(self, name: str) -> torch.Tensor:
        """Refuse: there are no weights.

        Raises:
            CompressError: Always.
        """
        raise CompressError(
            f"The tensor {name!r} of {self.path} is planned, not stored.", "Get the weights first."
        )


def headers_of(model: str | None, *, cache: Path | None = None) -> tuple[Checkpoint, Source]:
    """Sizes of a model's tensors, and where they come from; no tensor is read.

    Of a folder with weights their headers are read. Else shapes are those that transformers builds from the config
    without weights, in the config's dtype; where it names none, in the one that the index's total size implies, and
    in 16 bits without an index.

    Args:
        model: As for `compress.model.load.resolve`; of a hub model only config.json and the index are downloaded.
        cache: As for `compress.model.load.resolve`.

    Raises:
        CompressError: There is no such model, or its config or index cannot be read.
    """
    folder = resolve_headers(model, cache=cache)
    index = _read_index(folder)
    shards = set() if index is None else set(map(str, index.get("weight_map", {}).values()))
    if (folder / "model.safetensors").is_file() or (shards and all((folder / s).is_file() for s in shards)):
        return Checkpoint(folder), "headers"
    config = read_config(folder)
    shapes = _shapes(config)
    total = None if index is None else index.get("metadata", {}).get("total_size")
    dtype = _declared(config) or _implied(total, sum(map(math.prod, shapes.values())))
    planned = PlannedCheckpoint(folder, config=config, shapes=shapes, dtypes=dict.fromkeys(shapes, dtype))
    if is_uneven(config):
        planned = cut(planned, architecture_of(config))
    return planned, "config" if index is None else "index"


def cut(checkpoint: Checkpoint, arch: Architecture) -> PlannedCheckpoint:
    """What a checkpoint would be with the linears of ``arch``; every other tensor as it is.

    Args:
        checkpoint: The full model.
        arch: Its architecture with smaller layers.
    """
    smaller = expected_shapes(arch)
    layers = arch.layer_prefix.partition("{")[0]
    linears = {spec.name for spec in arch.linears}
    shapes: Shapes = {}
    for name in checkpoint.names:
        if name in smaller:
            shapes[name] = smaller[name]
        elif not (name.startswith(layers) and any(f".{linear}." in name for linear in linears)):
            shapes[name] = checkpoint.shape(name)
    dtypes = {name: checkpoint.dtype(name) for name in shapes}
    return PlannedCheckpoint(checkpoint.path, config=checkpoint.config, shapes=shapes, dtypes=dtypes)


def _shapes(config: Mapping[str, Any]) -> Shapes:
    """Shapes of every parameter; of a declared family one layer is built and stands for all, which are alike."""
    built = build_config(plain_config(config))
    if family_of(str(built.model_type)) is None:
        return meta_shapes(built)
    prefix = architecture_of(config).layer_prefix
    first = prefix.format(layer=0)
    found: Shapes = {}
    one = meta_shapes(shallow_config(built, 1))
    for name, shape in one.items():
        for layer in range(int(built.num_hidden_layers) if name.startswith(first) else 1):
            found[name.replace(first, prefix.format(layer=layer), 1)] = shape
    return found


def _read_index(folder: Path) -> dict[str, Any] | None:
    file = folder / INDEX_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        raise CompressError(f"The file {file} has no weight_map.", "Download it again.")
    return content


def _declared(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that the config names; None where it names none that is stored in safetensors."""
    return _TORCH_NAMES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))


def _implied(total: Any, parameters: int) -> torch.dtype:
    """32 bits where the index counts three bytes a parameter or more, else 16."""
    wide = isinstance(total, int | float) and parameters and total >= 3 * parameters
    return torch.float32 if wide else torch.bfloat16
