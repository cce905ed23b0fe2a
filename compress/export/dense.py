"""Write a model as a plain checkpoint: quantized matrices multiplied out, the adapter trained on it merged in."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from compress.adapters.adapter_file import AdapterFile
from compress.adapters.merge import adapter_changes, merged
from compress.model.architecture import Architecture
from compress.model.checkpoint import Checkpoint, CheckpointWriter, checkpoint_architecture, copy_side_files
from compress.progress import Progress
from compress.prune.weight_masks import WeightMasks, load_masks
from compress.quantize.checkpoint import MatrixRecord, read_lq_config
from compress.quantize.linear import LQLinear

CONFIG_KEY = "quantization_config"


class DenseView:
    """A checkpoint read as if nothing in it were quantized.

    Tensors that are not quantized come as they are stored; a quantized matrix comes as ``Q + L1 L2`` in float32, in
    the orientation of the layer it stands for, under the name of its weight.

    Args:
        checkpoint: Dense, or quantized by this package.

    Raises:
        CompressError: Its ``quantization_config`` cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.architecture: Architecture = checkpoint_architecture(checkpoint)
        self.config = {key: value for key, value in checkpoint.config.items() if key != CONFIG_KEY}
        stored = checkpoint.config.get(CONFIG_KEY)
        records = {} if stored is None else read_lq_config(stored)
        self._checkpoint = checkpoint
        self._quantized: dict[str, tuple[str, MatrixRecord]] = {
            f"{module}.weight": (module, record) for module, record in records.items()
        }
        owners = {
            f"{module}.{part}": f"{module}.weight"
            for module, record in records.items()
            for part in record.layout()
        }
        self.names = tuple(dict.fromkeys(owners.get(name, name) for name in checkpoint.names))
        self._transposed = {
            name
            for layer in range(self.architecture.layers)
            for spec in self.architecture.linears_at(layer)
            if spec.transposed
            and (name := f"{self.architecture.module_name(layer, spec)}.weight") in self._quantized
        }

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor is stored as codes."""
        return name in self._quantized

    def is_transposed(self, name: str) -> bool:
        """Whether a quantized matrix stands for a layer that stores its weight [in, out]."""
        return name in self._transposed

    def read(self, name: str) -> Tensor:
        """One tensor; a quantized one as float32 [out, in]."""
        if name not in self._quantized:
            return self._checkpoint.read(name)
        module, record = self._quantized[name]
        layer = LQLinear.from_stored(record, lambda part: self._checkpoint.read(f"{module}.{part}"))
        return layer.dequantized_weight()

    def dtype(self) -> torch.dtype:
        """In which a quantized matrix is written: that of the largest tensor that is stored dense."""
        dense = [name for name in self.names if name not in self._quantized]
        floating = [name for name in dense if self._checkpoint.dtype(name).is_floating_point]
        if not floating:
            return torch.bfloat16
        return self._checkpoint.dtype(max(floating, key=self._checkpoint.nbytes))


def write_dense(
    checkpoint: Checkpoint, out: Path, *, adapter: Path | None = None, progress: Progress | None = None
) -> Path:
    """Write ``checkpoint``, with ``adapter`` merged in, as a folder of plain weights.

    Every sum is taken in float32 and rounded once to the dtype of the model. An adapter that started from non-zero
    factors (LQ, PiSSA) changes its base by ``s (B A - B0 A0)`` (METHODS §2.4); on a model with single weights removed
    the change is multiplied by the mask, as in training. One tensor is in memory at a time.

    Args:
        checkpoint: A model, dense or quantized by this package.
        out: Folder to write, without weights in it.
        adapter: PEFT folder that was trained on ``checkpoint``.
        progress: Called after each tensor.

    Raises:
        CompressError: The adapter does not fit the model, is a DoRA, or changes one side of tied embeddings.
    """
    view = DenseView(checkpoint)
    masks = load_masks(checkpoint.path)
    with nullcontext() if adapter is None else AdapterFile(adapter) as file:
        _write(view, file, masks, out, progress)
    copy_side_files(checkpoint.path, out)
    return out


def _write(
    view: DenseView, file: AdapterFile | None, masks: WeightMasks | None, out: Path, progress: Progress | None
) -> None:
    arch, dtype = view.architecture, view.dtype()
    changes = {} if file is None else adapter_changes(view.names, arch, file)
    untied = arch.tied and arch.lm_head in changes and arch.lm_head not in view.names
    config = {**view.config, "tie_word_embeddings": False} if untied else view.config
    with CheckpointWriter(out, config=config) as writer:
        for index, name in enumerate(view.names):
            weight = view.read(name)
            stored = dtype if view.is_quantized(name) else weight.dtype
            if file is not None and name in changes:
                transposed = file.transposed and not view.is_quantized(name)
                transposed = transposed and name not in (arch.lm_head, arch.embedding)
                mask = None if masks is None else masks.mask(name.removesuffix(".weight"))
                changed = merged(weight.float(), file, changes[name], transposed=transposed, mask=mask)
            else:
                changed = weight
            if view.is_transposed(name):
                changed = changed.t().contiguous()
            writer.add(name, changed.to(stored))
            if file is not None and untied and name == arch.embedding:
                head = merged(weight.float(), file, changes[arch.lm_head], transposed=False)
                writer.add(arch.lm_head, head.to(stored))
            if progress is not None:
                progress(index + 1, len(view.names), name)
