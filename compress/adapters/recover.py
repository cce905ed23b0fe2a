"""Put an adapter trained on the pruned model onto the full one (LoRAM, arXiv 2502.13533 §3)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.adapters.adapter_file import (
    PREFIX,
    AdapterFile,
    Scaling,
    scaling_entries,
    write_adapter,
)
from compress.adapters.carried import carried_over, check_kind, check_origin
from compress.adapters.factors import Recompressed, scatter_rows
from compress.adapters.lanes import device_lanes
from compress.adapters.recompressed import Trained, recompressed
from compress.errors import CompressError, UsageError
from compress.model.architecture import Architecture
from compress.model.checkpoint import Checkpoint
from compress.model.uneven_config import refuse_uneven
from compress.progress import Progress
from compress.structure import StructureMap, kept_columns, kept_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """What recovery wrote.

    Attributes:
        modules: Modules with a factor pair.
        scattered: Of them, how many changed shape.
        differences: Of them, how many are the difference ``B A - B0 A0`` to non-zero initial factors.
        max_rank: Largest rank in the recovered adapter.
        parameters: Numbers stored in it.
        delta_norm: Frobenius norm of all deltas ``scaling * B A`` together.
        truncation: Module -> relative error ``||D - D_r||_F / ||D||_F`` of the re-compressed delta D; empty
            without re-compression.
        truncation_overall: The same over all modules together; 0 without re-compression.
    """

    modules: int
    scattered: int
    differences: int
    max_rank: int
    parameters: int
    delta_norm: float
    truncation: Mapping[str, float]
    truncation_overall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a small linear lies in the full one: its shape there, and kept rows and columns (None: all)."""

    shape: tuple[int, int]
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def changed(self) -> bool:
        return self.rows is not None or self.columns is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recovered:
    """One module's tensors, and the squared norms of ``scaling * B A`` and of what re-compression lost."""

    tensors: dict[str, Tensor]
    scaling: Scaling
    difference: bool
    norm: float
    lost: float


def recover_adapter(
    small_adapter: Path,
    structure: StructureMap,
    arch_full: Architecture,
    full: Checkpoint,
    out: Path,
    *,
    full_name: str,
    small_base: Checkpoint | None = None,
    compress_rank: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> RecoveryReport:
    """Write to ``out`` the adapter for the full model that corresponds to one trained on the pruned model.

    Rows of B of q, k, v, gate, up and columns of A of o, down are scattered into zeros at the kept indices;
    the other factors are copied, and every dtype is kept. An adapter with kept initial factors becomes the
    difference ``B A - B0 A0`` with rank r + r0, because the full base holds ``B0 A0`` already (METHODS §2.4).

    Args:
        small_adapter: PEFT folder, with ``initial_factors.safetensors`` when it did not start from zero.
        structure: What pruning kept.
        arch_full: Architecture of the full model.
        full: The full model; gives the shapes of adapted linears outside of the decoder layers.
        out: Folder to write.
        full_name: What ``adapter_config.json`` names as its base (never the pruned model).
        small_base: The model the adapter was trained on. Whole trained tensors (embeddings, norms, biases of linears
            that kept their shape) then become the full model's own plus what training changed; without it they
            are copied, which is right only where the two models have the same.
        compress_rank: Cut deltas of a larger rank back to this one, by QR of both factors and SVD of the
            core.
        device: Where deltas are measured and cut; on a CUDA device those of equal shapes together.
        progress: Called after each module.

    Raises:
        CompressError: The adapter does not belong to the structure or the model, or is of a kind that cannot
            be recovered; the message says why.
        UsageError: ``compress_rank`` is not positive.
    """
    if compress_rank is not None and compress_rank < 1:
        raise UsageError(f"The rank {compress_rank} is not positive.", "Give a rank of at least 1.")
    structure.check_matches(arch_full)
    if not structure.is_identity:
        refuse_uneven(arch_full)
    places = _places(arch_full, structure)
    found: dict[str, _Recovered] = {}
    with AdapterFile(small_adapter) as small:
        # trained on LQ linears it says no, although the full model's own are stored transposed
        transposed = small.transposed or any(spec.transposed for spec in arch_full.linears)
        check_kind(small, compress_rank)
        check_origin(small, structure)
        changed = {module for module, place in places.items() if place.changed}
        tensors = carried_over(small, changed, full, small_base)
        for module in small.modules:
            places[module] = places.get(module) or _outside(full, arch_full, module, transposed)
        made = [_trained(small, module, places[module]) for module in small.modules]
        with closing(recompressed(made, compress_rank, device_lanes(device))) as deltas:
            for one, delta in zip(made, deltas, strict=True):
                found[one.module] = _recovered(small, one, places[one.module], delta)
                tensors |= found[one.module].tensors
                if progress is not None:
                    progress(len(found), len(made), one.module)
        if not found:
            raise CompressError(f"The adapter {small_adapter} has no LoRA factors.", "Train a LoRA.")
        config = {**small.config, "base_model_name_or_path": full_name, "revision": None}
        config["fan_in_fan_out"] = transposed
        gone = replace(arch_full, layer_shapes=structure.shapes).gone()
        if gone:
            config["exclude_modules"] = _excluding(config.get("exclude_modules"), gone)
    if compress_rank is not None or any(r.difference for r in found.values()):
        config |= _plain_start({module: r.scaling for module, r in found.items()})
    write_adapter(out, config, tensors)
    norm, lost = sum(r.norm for r in found.values()), sum(r.lost for r in found.values())
    return RecoveryReport(
        modules=len(found),
        scattered=len(changed & set(found)),
        differences=sum(r.difference for r in found.values()),
        max_rank=max(r.scaling.rank for r in found.values()),
        parameters=sum(t.numel() for t in tensors.values()),
        delta_norm=math.sqrt(max(0.0, norm - lost)),
        truncation={m: _relative(r.lost, r.norm) for m, r in found.items()} if compress_rank else {},
        truncation_overall=_relative(lost, norm),
    )


def _trained(small: AdapterFile, module: str, place: _Place) -> Trained:
    """What training left of a module; its factors are read when they are asked for.

    Raises:
        CompressError: They are not what the config and the structure say.
    """
    shapes = [small.spec(f"{PREFIX}{module}.lora_{side}.weight")[0] for side in "AB"]
    scaling = small.scaling(module)
    if not shapes[0][0] == shapes[1][1] == scaling.rank:
        raise CompressError(
            f"The factors of {module} have rank {shapes[0][0]}, the config says {scaling.rank}.",
            "Save the adapter again.",
        )
    _check_fits(module, shapes[1][0], place.rows, place.shape[0], "rows")
    _check_fits(module, shapes[0][1], place.columns, place.shape[1], "columns")
    return Trained(small, module)


def _recovered(small: AdapterFile, made: Trained, place: _Place, found: Recompressed) -> _Recovered:
    # after the cut: the zero rows and columns that are put in change no singular value
    module, scaling = made.module, small.scaling(made.module)
    for rank in (made.rank, found.a.shape[0]):
        scaling = scaling if rank == scaling.rank else scaling.with_rank(rank)
    tensors = {
        f"{PREFIX}{module}.lora_A.weight": scatter_rows(found.a.T, place.columns, place.shape[1]).T,
        f"{PREFIX}{module}.lora_B.weight": scatter_rows(found.b, place.rows, place.shape[0]),
    }
    bias = f"{PREFIX}{module}.lora_B.bias"
    if bias in small.names:
        tensors[bias] = scatter_rows(small.read(bias), place.rows, place.shape[0])
    square = scaling.value**2
    return _Recovered(
        tensors=tensors,
        scaling=scaling,
        difference=made.started,
        norm=square * found.norm,
        lost=square * found.lost,
    )


def _places(arch: Architecture, structure: StructureMap) -> dict[str, _Place]:
    """Module -> its place, for the decoder linears."""
    pruned = not structure.is_identity
    return {
        arch.module_name(index, spec): _Place(
            shape=arch.at(index).linear_shape(spec),
            rows=kept_rows(arch, spec, layer) if pruned else None,
            columns=kept_columns(arch, spec, layer) if pruned else None,
        )
        for index, layer in enumerate(structure.layers)
        for spec in arch.linears_at(index)
    }


def _outside(full: Checkpoint, arch: Architecture, module: str, transposed: bool) -> _Place:
    """The place of a linear that pruning never touches, such as lm_head."""
    name = f"{module}.weight"
    if name == arch.lm_head and arch.tied:
        name = arch.embedding
    if name not in full.names:
        raise CompressError(
            f"The full model has no linear {module}.", "Give the model the adapter belongs to."
        )
    rows, columns = full.shape(name)
    flip = transposed and name not in (arch.lm_head, arch.embedding)
    return _Place(shape=(columns, rows) if flip else (rows, columns))


def _check_fits(module: str, width: int, kept: Tensor | None, size: int, label: str) -> None:
    expected = size if kept is None else len(kept)
    if width != expected:
        raise CompressError(
            f"The adapter of {module} has {width} {label} where the structure keeps {expected}.",
            "Give the structure of the model the adapter was trained on.",
        )


def _plain_start(scalings: Mapping[str, Scaling]) -> dict[str, Any]:
    """Config entries of what is an ordinary LoRA now; a special start would make PEFT change the base."""
    return {
        **scaling_entries(scalings),
        "init_lora_weights": True,
        "auto_mapping": None,
        "loftq_config": {},
        "corda_config": None,
        "eva_config": None,
        "lora_ga_config": None,
    }


def _excluding(before: Any, gone: tuple[str, ...]) -> Any:
    """PEFT's ``exclude_modules``, with what lies in ``gone``: the full model has it, the adapter does not."""
    inside = [rf"{re.escape(name)}\..*" for name in gone]
    if isinstance(before, str):
        return "|".join([f"(?:{before})", *inside])
    return "|".join([*(rf"(?:.*\.)?{re.escape(name)}" for name in before or ()), *inside])


def _relative(lost: float, norm: float) -> float:
    return math.sqrt(lost / norm) if norm > 0 else 0.0
