"""WeightMasks: which single weights of a small model's linears stay, one bit each, in a file beside the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.errors import CompressError
from compress.model.inside import require_inside
from compress.model.tensor_file import read_header, save_tensors

FILE_NAME = "masks.safetensors"
FORMAT_VERSION = "1"


def pack_bits(mask_OI: Tensor) -> Tensor:
    """A bool mask as uint8 [out, ceil(in / 8)]: column c is bit ``c % 8`` of byte ``c // 8``; the rest is 0."""
    out, into = mask_OI.shape
    padded = torch.zeros(out, -(-into // 8) * 8, dtype=torch.uint8, device=mask_OI.device)
    padded[:, :into] = mask_OI
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask_OI.device)
    return (padded.view(out, -1, 8) * weights).sum(dim=2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """What ``pack_bits`` packed: bool [out, columns]."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = packed[:, :, None].bitwise_right_shift(places).bitwise_and(1)
    return bits.flatten(1)[:, :columns].bool()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightMasks:
    """Masks of the linears that were thinned; others are whole.

    Attributes:
        pattern: "unstructured", or N:M.
        packed: Module name -> its mask [out, in], packed by ``pack_bits``.
        columns: Module name -> its input columns.
    """

    pattern: str
    packed: Mapping[str, Tensor]
    columns: Mapping[str, int]

    def mask(self, module: str) -> Tensor | None:
        """Bool [out, in], True where a weight stays; None for a linear that is whole."""
        if module not in self.packed:
            return None
        return unpack_bits(self.packed[module], self.columns[module])

    @property
    def removed(self) -> int:
        """Weights that were set to zero."""
        masks = (self.mask(module) for module in self.packed)
        return sum(int((~mask).sum()) for mask in masks if mask is not None)

    def save(self, path: Path) -> None:
        """Write ``{module}.mask`` for every thinned linear; pattern and columns are metadata."""
        metadata = {
            "format": "compress-masks",
            "format_version": FORMAT_VERSION,
            "pattern": self.pattern,
            "columns": json.dumps(dict(sorted(self.columns.items()))),
        }
        save_tensors(path, {f"{m}.mask": bits for m, bits in self.packed.items()}, metadata)

    @classmethod
    def load(cls, path: Path) -> WeightMasks:
        """Read a file written by :meth:`save`.

        Raises:
            CompressError: It is no such file, a link out of its folder, of another version, or a mask does not have
                its columns.
        """
        remedy = "Take the small model again from where it came, or prune again."
        require_inside(path.parent, path)
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                packed = {n.removesuffix(".mask"): file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CompressError(f"{path} is not a safetensors file ({error}).", remedy) from error
        if (metadata.get("format"), metadata.get("format_version")) != ("compress-masks", FORMAT_VERSION):
            raise CompressError(f"{path} holds no masks of format version {FORMAT_VERSION}.", remedy)
        columns = _columns(metadata.get("columns", "{}"))
        if columns is None:
            raise CompressError(f"The columns of the masks in {path} cannot be read.", remedy)
        for module, bits in packed.items():
            width = -(-columns.get(module, 0) // 8)
            if bits.dtype != torch.uint8 or bits.dim() != 2 or bits.shape[1] != width:
                raise CompressError(f"The mask of {module} in {path} does not have its columns.", remedy)
        return cls(pattern=metadata.get("pattern", ""), packed=packed, columns=columns)


def _columns(text: str) -> dict[str, int] | None:
    """Input columns by module; None where the text is nothing of the kind."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    counts = isinstance(found, dict) and all(type(count) is int for count in found.values())
    return found if counts else None


def require_masks(path: Path) -> None:
    """Refuse a file that holds anything but masks, by its header alone.

    Raises:
        CompressError: It does, or is a link out of its folder.
    """
    require_inside(path.parent, path)
    entries, metadata = read_header(path)
    alien = [n for n, e in entries.items() if not n.endswith(".mask") or e.dtype != torch.uint8]
    if (metadata.get("format"), metadata.get("format_version")) != (
        "compress-masks",
        FORMAT_VERSION,
    ) or alien:
        raise CompressError(
            f"{path} holds no masks of format version {FORMAT_VERSION}.",
            "Take the small model again from where it came, or prune again.",
        )


def load_masks(folder: Path) -> WeightMasks | None:
    """The masks beside a model or an adapter; None where nothing was thinned."""
    return WeightMasks.load(folder / FILE_NAME) if (folder / FILE_NAME).is_file() else None
