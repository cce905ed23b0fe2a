"""StructureMap: which KV groups, query heads and MLP channels of every layer are kept, as explicit indices."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from compress.errors import CompressError
from compress.model.architecture import Architecture, LayerShape, LinearSpec
from compress.model.inside import require_inside
from compress.model.layout import ATTENTION_ROLES
from compress.model.tensor_file import save_tensors

__all__ = [
    "ATTENTION_ROLES",
    "FILE_NAME",
    "FORMAT_VERSION",
    "ROW_ROLES",
    "LayerShape",
    "LayerStructure",
    "StructureMap",
    "full_layer",
    "full_shape",
    "kept_columns",
    "kept_heads",
    "kept_rows",
    "structure_map",
]

FORMAT_VERSION = "2"
"""Version 2 added query heads and layers that keep nothing; version 1 files are read as they are."""
FILE_NAME = "structure.safetensors"
_WIDEST = 1 << 24
"""Rows of q that a structure may speak of; the widest models have a thousandth of that."""

ROW_ROLES = frozenset({"q", "k", "v", "gate", "up", "qkv", "gate_up"})
"""Roles whose output rows belong to groups; the others ("o", "down") have their input columns in groups."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerStructure:
    """What one decoder layer keeps. An empty list means that the attention, or the MLP, is gone.

    Attributes:
        kv_groups: Kept KV groups, int32 [n], strictly increasing indices into the original key/value heads.
        channels: Kept MLP channels, int32 [c], strictly increasing indices into the original channels.
        query_heads: Kept query heads, int32, strictly increasing indices into the original query heads, the
            same number in every kept KV group and none in the others; None: all of the kept KV groups.
    """

    kv_groups: torch.Tensor
    channels: torch.Tensor
    query_heads: torch.Tensor | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerStructure):
            return NotImplemented
        if (self.query_heads is None) != (other.query_heads is None):
            return False
        return (
            torch.equal(self.kv_groups, other.kv_groups)
            and torch.equal(self.channels, other.channels)
            and (
                self.query_heads is None
                or other.query_heads is None
                or torch.equal(self.query_heads, other.query_heads)
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureMap:
    """The outcome of structured pruning: indices, never ratios.

    Attributes:
        layers: One entry per decoder layer.
        heads: Query heads of the original model.
        kv_heads: Key/value heads of the original model.
        head_dim: Width of one head.
        channels: MLP channels of the original model.
        base_fingerprint: Fingerprint of the checkpoint the indices refer to.
        family: Architecture family of that checkpoint.
    """

    layers: tuple[LayerStructure, ...]
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    base_fingerprint: str
    family: str

    def __post_init__(self) -> None:
        for index, layer in enumerate(self.layers):
            for label, kept, size in (
                ("KV groups", layer.kv_groups, self.kv_heads),
                ("channels", layer.channels, self.channels),
            ):
                if fault := _index_fault(kept, size):
                    raise CompressError(
                        f"The kept {label} of layer {index} {fault}.",
                        "Prune again: the structure does not belong to this model.",
                    )
            if fault := self._query_fault(layer):
                raise CompressError(
                    f"The kept query heads of layer {index} {fault}.",
                    "Prune again: the structure does not belong to this model.",
                )

    @property
    def queries_per_group(self) -> int:
        """Query heads of one KV group of the original model."""
        return self.heads // self.kv_heads

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """How much every layer keeps."""
        return tuple(
            LayerShape(
                kv_heads=len(layer.kv_groups),
                queries=self.queries_per_group
                if layer.query_heads is None or len(layer.kv_groups) == 0
                else len(layer.query_heads) // len(layer.kv_groups),
                channels=len(layer.channels),
            )
            for layer in self.layers
        )

    @property
    def uniform(self) -> LayerShape | None:
        """What every layer keeps, or None when the layers differ in size or one has lost a whole branch."""
        sizes = set(self.shapes)
        shape = sizes.pop()
        return shape if not sizes and shape.kv_heads and shape.channels else None

    @property
    def is_identity(self) -> bool:
        """Whether nothing was pruned."""
        return self.uniform == LayerShape(
            kv_heads=self.kv_heads, queries=self.queries_per_group, channels=self.channels
        )

    def _query_fault(self, layer: LayerStructure) -> str:
        if layer.query_heads is None:
            return ""
        if len(layer.kv_groups) == 0:
            return "" if len(layer.query_heads) == 0 else "belong to no KV group"
        if fault := _index_fault(layer.query_heads, self.heads):
            return fault
        groups, counts = (layer.query_heads // self.queries_per_group).unique(return_counts=True)
        if not torch.equal(groups.int(), layer.kv_groups) or len(counts.unique()) != 1:
            return "are not the same number in every kept KV group"
        return ""

    def digest(self) -> str:
        """SHA-256 of the sizes and of every kept index, in hexadecimal; what it is a structure of is left out."""
        total = hashlib.sha256(repr((self.heads, self.kv_heads, self.head_dim, self.channels)).encode())
        for layer in self.layers:
            queries = None if layer.query_heads is None else layer.query_heads.tolist()
            total.update(repr((layer.kv_groups.tolist(), queries, layer.channels.tolist())).encode())
        return total.hexdigest()

    def check_matches(self, arch: Architecture) -> None:
        """Raise CompressError unless the map was made for a model of ``arch``'s sizes."""
        ours = (len(self.layers), self.heads, self.kv_heads, self.head_dim, self.channels)
        theirs = (arch.layers, arch.heads, arch.kv_heads, arch.head_dim, arch.channels)
        if ours != theirs:
            raise CompressError(
                f"The structure was made for {_sizes(ours)}, but the model has {_sizes(theirs)}.",
                "Give the original model that was pruned.",
            )

    def save(self, path: Path) -> None:
        """Write ``layers.{i}.kv_groups``, ``.channels`` and ``.query_heads`` (where given), sizes as metadata."""
        tensors: dict[str, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):  # clones: layers may share a tensor, safetensors may not
            tensors[f"layers.{index}.kv_groups"] = layer.kv_groups.clone()
            tensors[f"layers.{index}.channels"] = layer.channels.clone()
            if layer.query_heads is not None:
                tensors[f"layers.{index}.query_heads"] = layer.query_heads.clone()
        metadata = {
            "format": "compress-structure",
            "format_version": FORMAT_VERSION,
            "layers": str(len(self.layers)),
            "heads": str(self.heads),
            "kv_heads": str(self.kv_heads),
            "head_dim": str(self.head_dim),
            "channels": str(self.channels),
            "base_fingerprint": self.base_fingerprint,
            "family": self.family,
        }
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> StructureMap:
        """Read a file written by :meth:`save`.

        Raises:
            CompressError: The file is missing, a link out of its folder, no structure file, of another version or
                inconsistent.
        """
        remedy = "Point to the structure.safetensors of a pruned model, or prune again."
        if not path.is_file():
            raise CompressError(f"There is no structure file {path}.", remedy)
        require_inside(path.parent, path)
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                names = set(file.keys())
                sizes = _stored_sizes(metadata, names)
                tensors = {} if sizes is None else {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise CompressError(f"{path} is not a safetensors file ({error}).", remedy) from error
        if metadata.get("format") != "compress-structure":
            raise CompressError(f"{path} is not a structure file.", remedy)
        if metadata.get("format_version") not in ("1", FORMAT_VERSION):
            raise CompressError(
                f"{path} has format version {metadata.get('format_version')}, not {FORMAT_VERSION}.",
                "Use the version of compress that wrote it, or prune again.",
            )
        if sizes is None:
            raise CompressError(f"{path} is incomplete.", remedy)
        return cls(
            layers=tuple(
                LayerStructure(
                    kv_groups=tensors[f"layers.{i}.kv_groups"],
                    channels=tensors[f"layers.{i}.channels"],
                    query_heads=tensors.get(f"layers.{i}.query_heads"),
                )
                for i in range(sizes["layers"])
            ),
            heads=sizes["heads"],
            kv_heads=sizes["kv_heads"],
            head_dim=sizes["head_dim"],
            channels=sizes["channels"],
            base_fingerprint=metadata.get("base_fingerprint", ""),
            family=metadata.get("family", ""),
        )


def _stored_sizes(metadata: Mapping[str, str], names: Set[str]) -> dict[str, int] | None:
    """The sizes in a structure file's header; None where they are not there or not those of its tensors.

    They come from a file that anyone may have written, so nothing is made as large as they say before this.
    """
    texts = {key: metadata.get(key, "") for key in ("layers", "heads", "kv_heads", "head_dim", "channels")}
    if not all(re.fullmatch("[0-9]{1,10}", text) for text in texts.values()):
        return None
    sizes = {key: int(text) for key, text in texts.items()}
    layers, heads = sizes["layers"], sizes["heads"]
    if not all(sizes.values()) or layers > len(names) or sizes["channels"] > torch.iinfo(torch.int32).max:
        return None
    if heads % sizes["kv_heads"] or heads * sizes["head_dim"] > _WIDEST:
        return None
    expected = {f"layers.{i}.{kind}" for i in range(layers) for kind in ("kv_groups", "channels")}
    optional = {f"layers.{i}.query_heads" for i in range(layers)}
    return sizes if expected == names - optional else None


def structure_map(
    arch: Architecture, layers: Iterable[LayerStructure], *, base_fingerprint: str
) -> StructureMap:
    """The StructureMap of ``layers`` for a model of architecture ``arch``."""
    return StructureMap(
        layers=tuple(layers),
        heads=arch.heads,
        kv_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        channels=arch.channels,
        base_fingerprint=base_fingerprint,
        family=arch.family,
    )


def composed(first: StructureMap, then: StructureMap) -> StructureMap:
    """One structure for pruning a model by ``first`` and the result by ``then``.

    Raises:
        CompressError: ``then`` was not made for what ``first`` leaves.
    """
    left = first.uniform
    sizes = (left.kv_heads, left.kv_heads * left.queries, left.channels) if left is not None else None
    if sizes != (then.kv_heads, then.heads, then.channels) or len(first.layers) != len(then.layers):
        raise CompressError(
            "The second structure was not made for what the first one leaves.", "Prune the model again."
        )
    layers = []
    for outer, inner in zip(first.layers, then.layers, strict=True):
        heads = _heads_of(outer, first.queries_per_group)
        kept = heads[_heads_of(inner, then.queries_per_group)]
        groups = outer.kv_groups[inner.kv_groups.long()]
        whole = len(kept) == len(groups) * first.queries_per_group
        layers.append(
            LayerStructure(
                kv_groups=groups,
                channels=outer.channels[inner.channels.long()],
                query_heads=None if whole else kept.int(),
            )
        )
    return replace(first, layers=tuple(layers))


def _heads_of(layer: LayerStructure, queries: int) -> torch.Tensor:
    return layer.query_heads.long() if layer.query_heads is not None else _blocks(layer.kv_groups, queries)


def full_layer(arch: Architecture) -> LayerStructure:
    """The layer structure that keeps everything."""
    return LayerStructure(
        kv_groups=torch.arange(arch.kv_heads, dtype=torch.int32),
        channels=torch.arange(arch.channels, dtype=torch.int32),
    )


def full_shape(arch: Architecture) -> LayerShape:
    """The layer shape that keeps everything."""
    return LayerShape(kv_heads=arch.kv_heads, queries=arch.queries_per_group, channels=arch.channels)


def kept_heads(arch: Architecture, layer: LayerStructure) -> torch.Tensor:
    """Kept query heads, int64, also where the layer leaves them to its KV groups."""
    if layer.query_heads is not None:
        return layer.query_heads.long()
    return _blocks(layer.kv_groups, arch.queries_per_group)


def kept_rows(arch: Architecture, spec: LinearSpec, layer: LayerStructure) -> torch.Tensor | None:
    """Kept output rows of a linear of the original model, int64 [rows]; None when all rows stay.

    Rows of q are the kept query heads; a fused linear keeps the rows of each of its parts.
    """
    if spec.role not in ROW_ROLES:
        return None
    if spec.role in ATTENTION_ROLES:
        heads = kept_heads(arch, layer)
        all_heads, all_groups = len(heads) == arch.heads, len(layer.kv_groups) == arch.kv_heads
        if all_heads if spec.role in ("q", "qkv") else all_groups:
            return None
        queries = _blocks(heads, arch.head_dim)
        keys = _blocks(layer.kv_groups, arch.head_dim)
        if spec.role == "q":
            return queries
        if spec.role in ("k", "v"):
            return keys
        first_key = arch.heads * arch.head_dim
        first_value = first_key + arch.kv_heads * arch.head_dim
        return torch.cat([queries, first_key + keys, first_value + keys])
    if len(layer.channels) == arch.channels:
        return None
    channels = layer.channels.long()
    return torch.cat([channels, arch.channels + channels]) if spec.role == "gate_up" else channels


def kept_columns(arch: Architecture, spec: LinearSpec, layer: LayerStructure) -> torch.Tensor | None:
    """Kept input columns of a linear of the original model, int64 [columns]; None when all columns stay."""
    if spec.role == "o":
        heads = kept_heads(arch, layer)
        return None if len(heads) == arch.heads else _blocks(heads, arch.head_dim)
    if spec.role == "down" and len(layer.channels) < arch.channels:
        return layer.channels.long()
    return None


def _blocks(groups: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of blocks of ``width`` consecutive entries: groups [n] -> int64 [n * width]."""
    return (groups.long()[:, None] * width + torch.arange(width)).flatten()


def _index_fault(kept: torch.Tensor, size: int) -> str:
    if kept.dim() != 1 or kept.dtype != torch.int32:
        return "are not a list of int32 indices"
    if len(kept) == 0:
        return ""
    if bool((kept[1:] <= kept[:-1]).any()):
        return "are not sorted"
    if int(kept[0]) < 0 or int(kept[-1]) >= size:
        return f"lie outside 0 to {size - 1}"
    return ""


def _sizes(sizes: tuple[int, ...]) -> str:
    layers, heads, kv_heads, head_dim, channels = sizes
    return (
        f"{layers} layers, {heads} heads in {kv_heads} KV groups of width {head_dim} and {channels} channels"
    )
