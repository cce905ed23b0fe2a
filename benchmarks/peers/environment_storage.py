"""What a peer stored, counted on its files, and the dense model that it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from compress.errors import CompressError
from compress.model.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    checkpoint_architecture,
    copy_side_files,
    require_dense,
)
from compress.model.tensor_file import read_header

__all__ = ["linear_shapes", "stored_bytes", "write_dense"]


def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Module name and (out, in) of every decoder linear of a dense checkpoint.

    Raises:
        CompressError: It is no dense checkpoint of a decoder, or stores its linears transposed, as no peer expects.
    """
    checkpoint = Checkpoint(model)
    require_dense(checkpoint, allow_lq=False)
    arch = checkpoint_architecture(checkpoint)
    if any(spec.transposed for spec in arch.linears):
        raise CompressError(
            f"The model {model} stores its linears transposed.", "Use a model with ordinary linears."
        )
    return {
        arch.module_name(layer, spec): arch.at(layer).linear_shape(spec)
        for layer in range(arch.layers)
        for spec in arch.linears_at(layer)
    }


def stored_bytes(folder: Path, linears: Sequence[str]) -> dict[str, int]:
    """Bytes of every tensor that belongs to ``linears`` in a folder's safetensors files, by the tensors' ending.

    A tensor belongs to a linear when its name is the linear's with an ending: codes, scales, zeros, order of columns,
    tables, and what else a method stores with it. Biases are no quantized weights and are left out.

    Raises:
        CompressError: A linear has no tensor: the method stores it under another name.
    """
    sizes: dict[str, int] = {}
    known = frozenset(linears)
    missing = set(known)
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in read_header(file)[0].items():
            owner = _owner(name, known)
            if owner is None or name == f"{owner}.bias":
                continue
            missing.discard(owner)
            ending = name.removeprefix(f"{owner}.")
            sizes[ending] = sizes.get(ending, 0) + entry.nbytes
    if missing:
        raise CompressError(
            f"The checkpoint {folder} stores nothing of {len(missing)} linears, first {min(missing)!r}.",
            "Check what the quantizer left out.",
        )
    return dict(sorted(sizes.items()))


def write_dense(model: Path, weights: Path, out: Path, linears: Sequence[str]) -> float:
    """Copy ``model`` in float32 with the linears of the file ``weights``, and return their relative error.

    Raises:
        CompressError: The file is not of all ``linears``; a weight has another shape than in ``model``, or is not
            finite.
    """
    source, given = Checkpoint(model), read_header(weights)[0]
    other = sorted(given.keys() ^ {f"{name}.weight" for name in linears})
    if other:
        raise CompressError(
            f"The peer returned other weights than the decoder's linears, first {other[0]!r}.",
            "Check what the quantizer left out.",
        )
    difference = total = 0.0
    with CheckpointWriter(out, config={**source.config, "dtype": "float32"}) as writer:
        for name in source.names:
            tensor = source.read(name).float()
            if name in given:
                new = given[name].read()
                if new.shape != tensor.shape or not bool(torch.isfinite(new).all()):
                    raise CompressError(
                        f"The peer's weight {name!r} has the shape {tuple(new.shape)} or is not finite.",
                        f"It should be {tuple(tensor.shape)}: check the peer's versions.",
                    )
                difference += float((new.double() - tensor).square().sum())
                total += float(tensor.double().square().sum())
                tensor = new
            writer.add(name, tensor)
    copy_side_files(model, out)
    return math.sqrt(difference / total)


def _owner(name: str, linears: frozenset[str]) -> str | None:
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((prefix for prefix in prefixes if prefix in linears), None)
