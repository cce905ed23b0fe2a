"""Write a model as a plain checkpoint: quantized matrices multiplied out, the adapter trained on it merged in."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from compress.adapters.adapter_file import AdapterFile
from compress.adapters.lanes import device_lanes
from compress.adapters.merge import adapter_changes, writing_order
from compress.adapters.merged import Request, merged_tensors
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

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor as :meth:`read` gives it."""
        if name not in self._quantized:
            return self._checkpoint.shape(name)
        return self._quantized[name][1].shape

    def stored_dtype(self, name: str) -> torch.dtype:
        """Of a tensor as it is written."""
        return self.dtype() if name in self._quantized else self._checkpoint.dtype(name)

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
    checkpoint: Checkpoint,
    out: Path,
    *,
    adapter: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Write ``checkpoint``, with ``adapter`` merged in, as a folder of plain weights.

    Every sum is taken in float32 and rounded once to the dtype of the model. An adapter that started from non-zero
    factors (LQ, PiSSA) changes its base by ``s (B A - B0 A0)`` (METHODS §2.4); on a model with single weights removed
    the change is multiplied by the mask, as in training. On the CPU one tensor is in memory at a time, and its change.

    Args:
        checkpoint: A model, dense or quantized by this package.
        out: Folder to write, without weights in it.
        adapter: PEFT folder that was trained on ``checkpoint``.
        device: Where the products of its factors are computed, as in ``merge_adapter``.
        progress: Called after each tensor.

    Raises:
        CompressError: The adapter does not fit the model, is a DoRA, or changes one side of tied embeddings; or the
            device has no room for its largest matrix.
    """
    view = DenseView(checkpoint)
    masks = load_masks(checkpoint.path)
    with nullcontext() if adapter is None else AdapterFile(adapter) as file:
        _write(view, file, masks, out, device, progress)
    copy_side_files(checkpoint.path, out)
    return out


def _write(
    view: DenseView,
    file: AdapterFile | None,
    masks: WeightMasks | None,
    out: Path,
    device: torch.device | str,
    progress: Progress | None,
) -> None:
    arch = view.architecture
    changes = {} if file is None else adapter_changes(view.names, arch, file)
    untied = arch.tied and arch.lm_head in changes and arch.lm_head not in view.names
    config = {**view.config, "tie_word_embeddings": False} if untied else view.config
    written = writing_order(view.names, arch.embedding, arch.lm_head, untied=untied)
    outside = (arch.lm_head, arch.embedding)

    def request(target: str, source: str, adapter: AdapterFile) -> Request:
        quantized = view.is_quantized(source)
        return Request(
            change=changes[target],
            shape=view.shape(source),
            dtype=torch.float32 if quantized else view.stored_dtype(source),
            read=partial(view.read, source),
            transposed=adapter.transposed and not quantized and target not in outside,
            mask=_mask(masks, target.removesuffix(".weight")),
            stored=view.stored_dtype(source),
        )

    results: Generator[Tensor] = (_ for _ in ())
    if file is not None:
        requests = [request(target, source, file) for target, source in written if target in changes]
        results = merged_tensors(requests, file, device_lanes(device))
    with CheckpointWriter(out, config=config) as writer, closing(results):
        for index, (target, source) in enumerate(written):
            changed = target in changes
            tensor = next(results) if changed else view.read(source).to(view.stored_dtype(source))
            writer.add(target, tensor.t().contiguous() if view.is_transposed(source) else tensor)
            if progress is not None:
                progress(index + 1, len(written), target)


def _mask(masks: WeightMasks | None, module: str) -> Callable[[], Tensor] | None:
    """Unpacks the mask of a module when it is asked to; None for a module that is whole."""
    if masks is None or module not in masks.packed:
        return None

    def unpacked() -> Tensor:
        found = masks.mask(module)
        assert found is not None
        return found

    return unpacked
