"""Write a quantized model with what was trained on it folded into its low-rank factors: quantized files stay small.

LQ-LoRA's compression mode (METHODS §3.5): once the factors are trained, they are stored in 8-bit NormalFloat.
"""

from __future__ import annotations

import math
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from compress.adapters.adapter_file import AdapterFile
from compress.adapters.lanes import device_lanes
from compress.adapters.merge import adapter_changes, writing_order
from compress.adapters.merged import Request, merged_tensors
from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint, CheckpointWriter, checkpoint_architecture, copy_side_files
from compress.progress import Progress
from compress.prune.weight_masks import load_masks
from compress.quantize.checkpoint import MatrixRecord, factor_tensors, lq_config, read_lq_config
from compress.quantize.config import FACTOR_8BIT
from compress.quantize.decompose import store_factor
from compress.quantize.linear import LQLinear

CONFIG_KEY = "quantization_config"
_REMEDY = "Give --format dense."


def write_packed(
    checkpoint: Checkpoint,
    out: Path,
    *,
    adapter: Path,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Write ``checkpoint`` with ``adapter`` in it as a quantized checkpoint of its own.

    Factors that were trained in place of the checkpoint's own (``--method lq``) replace them; those of a LoRA beside
    them join them, so the rank is the sum of both. All factors are stored in 8 bits. What the adapter changes outside
    the quantized matrices is merged, summed in float32 and rounded once. Tensor by tensor.

    Args:
        checkpoint: Quantized by this package.
        out: Folder to write, without weights in it.
        adapter: PEFT folder that was trained on ``checkpoint``.
        device: Where what is merged is computed.
        progress: Called after each tensor.

    Raises:
        CompressError: The checkpoint is not quantized, single weights of it are removed (a masked product has no low
            rank), the adapter does not fit it, is a DoRA, or changes a matrix outside the decoder that is quantized.
    """
    stored = checkpoint.config.get(CONFIG_KEY)
    if stored is None:
        raise CompressError(f"{checkpoint.path} is not quantized: it has no factors.", _REMEDY)
    if load_masks(checkpoint.path) is not None:
        raise CompressError(
            "Single weights of the model are removed: a masked product has no low rank.", _REMEDY
        )
    with AdapterFile(adapter) as file:
        _write(checkpoint, read_lq_config(stored), file, out, device, progress)
    copy_side_files(checkpoint.path, out)
    return out


def _write(
    checkpoint: Checkpoint,
    records: dict[str, MatrixRecord],
    file: AdapterFile,
    out: Path,
    device: torch.device | str,
    progress: Progress | None,
) -> None:
    arch = checkpoint_architecture(checkpoint)
    owners = {f"{module}.{part}": module for module, record in records.items() for part in record.layout()}
    names = list(dict.fromkeys(f"{owners[n]}.weight" if n in owners else n for n in checkpoint.names))
    changes = adapter_changes(names, arch, file)
    trained = {module for module in records if f"{module}.weight" in changes}
    outside = {arch.embedding.removesuffix(".weight"), arch.lm_head.removesuffix(".weight")}
    if foreign := sorted(trained & outside):
        raise CompressError(
            f"The adapter changes {foreign[0]}, which is quantized and takes no factors.", _REMEDY
        )
    untied = arch.tied and arch.lm_head in changes and arch.lm_head not in names
    if untied and arch.embedding.removesuffix(".weight") in records:
        raise CompressError(
            "The adapter changes the output matrix, whose codes the embedding shares.", _REMEDY
        )
    written = writing_order(names, arch.embedding, arch.lm_head, untied=untied)
    dense = [(t, s) for t, s in written if t in changes and t.removesuffix(".weight") not in trained]
    requests = [
        Request(
            change=changes[target],
            shape=checkpoint.shape(source),
            dtype=checkpoint.dtype(source),
            read=partial(checkpoint.read, source),
            transposed=file.transposed and target not in (arch.lm_head, arch.embedding),
            mask=None,
            stored=checkpoint.dtype(source),
        )
        for target, source in dense
    ]
    config = dict(checkpoint.config) | ({"tie_word_embeddings": False} if untied else {})
    config[CONFIG_KEY] = lq_config(
        {m: _with_rank(r, _rank(r, file, m)) if m in trained else r for m, r in records.items()}
    )
    results = merged_tensors(requests, file, device_lanes(device))
    with CheckpointWriter(out, config=config) as writer, closing(results):
        for index, (target, source) in enumerate(written):
            module = target.removesuffix(".weight")
            if module in records:
                for name, tensor in _matrix(
                    checkpoint, module, records[module], file, module in trained
                ).items():
                    writer.add(f"{module}.{name}", tensor)
            elif target in changes:
                writer.add(target, next(results))
            else:
                writer.add(target, checkpoint.read(source))
            if progress is not None:
                progress(index + 1, len(written), target)


def _rank(record: MatrixRecord, file: AdapterFile, module: str) -> int:
    """Of a matrix once it is trained."""
    added = file.factors(module)[0].shape[0]
    return added if file.initial_rank(module) is not None else record.rank + added


def _with_rank(record: MatrixRecord, rank: int) -> MatrixRecord:
    return MatrixRecord(shape=record.shape, config=record.config, rank=rank, factor_config=FACTOR_8BIT)


def _matrix(
    checkpoint: Checkpoint, module: str, record: MatrixRecord, file: AdapterFile, trained: bool
) -> dict[str, Tensor]:
    """Stored tensors of one matrix by their names in its module, factors as they are once trained."""
    parts = list(record.layout())
    if not trained:
        return {part: checkpoint.read(f"{module}.{part}") for part in parts}
    root = math.sqrt(file.scaling(module).value)
    factor_a, factor_b = (factor.float() * root for factor in file.factors(module))
    outs, ins = [factor_b.T], [factor_a]
    if file.initial_rank(module) is None:
        layer = LQLinear.from_stored(record, lambda part: checkpoint.read(f"{module}.{part}"))
        own = layer.factors()
        if own is not None:
            outs, ins = [own[0].float().T, *outs], [own[1].float(), *ins]
    tensors = {part: checkpoint.read(f"{module}.{part}") for part in parts if not part.startswith("factor_")}
    for name, rows in (("factor_out", outs), ("factor_in", ins)):
        tensors |= factor_tensors(name, store_factor(torch.cat(rows).contiguous(), FACTOR_8BIT))
    return tensors
