"""Put an adapter trained on the pruned model onto the full one (LoRAM, arXiv 2502.13533 §3)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.adapters.adapter_file import (
    BASE_KEY,
    PREFIX,
    STRUCTURE_KEY,
    AdapterFile,
    Scaling,
    owner,
    scaling_entries,
    write_adapter,
)
from compress.adapters.factors import difference_factors, recompress, scatter_rows, squared_norm
from compress.errors import CompressError, UsageError
from compress.model.architecture import Architecture
from compress.model.checkpoint import Checkpoint
from compress.model.uneven_config import refuse_uneven
from compress.progress import Progress
from compress.structure import StructureMap, kept_columns, kept_rows

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` that move a part of the base weight into the factors."""


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
        _check_kind(small, compress_rank)
        _check_origin(small, structure)
        tensors = _copies(small, places, full, small_base)
        for module in small.modules:
            place = places.get(module) or _outside(full, arch_full, module, transposed)
            found[module] = _recover_module(small, module, place, compress_rank)
            tensors |= found[module].tensors
            if progress is not None:
                progress(len(found), len(small.modules), module)
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
        scattered=sum(module in places and places[module].changed for module in found),
        differences=sum(r.difference for r in found.values()),
        max_rank=max(r.scaling.rank for r in found.values()),
        parameters=sum(t.numel() for t in tensors.values()),
        delta_norm=math.sqrt(max(0.0, norm - lost)),
        truncation={m: _relative(r.lost, r.norm) for m, r in found.items()} if compress_rank else {},
        truncation_overall=_relative(lost, norm),
    )


def _recover_module(small: AdapterFile, module: str, place: _Place, compress_rank: int | None) -> _Recovered:
    factor_a, factor_b = small.factors(module)
    scaling = small.scaling(module)
    if not factor_a.shape[0] == factor_b.shape[1] == scaling.rank:
        raise CompressError(
            f"The factors of {module} have rank {factor_a.shape[0]}, the config says {scaling.rank}.",
            "Save the adapter again.",
        )
    _check_fits(module, factor_b.shape[0], place.rows, place.shape[0], "rows")
    _check_fits(module, factor_a.shape[1], place.columns, place.shape[1], "columns")
    initial = small.initial_factors(module)
    if initial is not None:
        factor_a, factor_b = difference_factors(factor_a, factor_b, *initial)
        scaling = scaling.with_rank(factor_a.shape[0])
    norm, lost = squared_norm(factor_a, factor_b), 0.0
    if compress_rank is not None and factor_a.shape[0] > compress_rank:
        # before the scatter: zero rows and columns change no singular value
        factor_a, factor_b, lost = recompress(factor_a, factor_b, compress_rank)
        scaling = scaling.with_rank(compress_rank)
    tensors = {
        f"{PREFIX}{module}.lora_A.weight": scatter_rows(factor_a.T, place.columns, place.shape[1]).T,
        f"{PREFIX}{module}.lora_B.weight": scatter_rows(factor_b, place.rows, place.shape[0]),
    }
    bias = f"{PREFIX}{module}.lora_B.bias"
    if bias in small.names:
        tensors[bias] = scatter_rows(small.read(bias), place.rows, place.shape[0])
    square = scaling.value**2
    return _Recovered(
        tensors=tensors,
        scaling=scaling,
        difference=initial is not None,
        norm=square * norm,
        lost=square * lost,
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


def _check_kind(small: AdapterFile, compress_rank: int | None) -> None:
    start = small.config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_BASE_CHANGING) and not small.has_initial_factors:
        raise CompressError(
            f"The adapter started from {start} factors, which hold a part of its base, and none were kept.",
            "Convert it with PEFT's path_initial_model_for_weight_conversion first.",
        )
    if small.config.get("use_dora") and (compress_rank is not None or small.has_initial_factors):
        raise CompressError(
            "The factors of a DoRA adapter cannot be changed: its magnitudes belong to them.",
            "Train a LoRA without DoRA.",
        )


def _check_origin(small: AdapterFile, structure: StructureMap) -> None:
    """Refuse an adapter that says it was trained on another small model; one that says nothing is compared by shape."""
    base, digest = small.metadata.get(BASE_KEY), small.metadata.get(STRUCTURE_KEY)
    if base is not None and base != structure.base_fingerprint:
        raise CompressError(
            f"The adapter {small.path} was trained on a model cut from another full model.",
            "Give the adapter and the small model that belong together.",
        )
    if digest is not None and digest != structure.digest():
        raise CompressError(
            f"The adapter {small.path} was trained on a small model that keeps other groups or channels.",
            "Give the adapter and the small model that belong together.",
        )


def _copies(
    small: AdapterFile, places: Mapping[str, _Place], full: Checkpoint, base: Checkpoint | None
) -> dict[str, Tensor]:
    """Everything but the factor pairs of linears: carried over where no shape changed, refused elsewhere."""
    copies: dict[str, Tensor] = {}
    for name in small.names:
        module, kind = owner(name)
        if kind in ("lora_A.weight", "lora_B.weight", "lora_B.bias"):
            continue
        if module in places and places[module].changed:
            what, why = "trained base tensor", "its pruned part was never trained"
            if kind == "lora_magnitude_vector":
                what, why = "DoRA magnitude", "it was trained for the norms of the pruned weight"
            raise CompressError(
                f"The {what} of {module} cannot be recovered: {why}.", "Train a plain LoRA on pruned linears."
            )
        trained = small.read(name)
        if kind == "lora_magnitude_vector" and base is not None:
            _check_same(f"{module}.weight", full, base)
        if kind in ("weight", "bias") and base is not None:
            trained = _moved(trained, f"{module}.{kind}", full, base)
        copies[name] = trained
    return copies


def _check_same(name: str, full: Checkpoint, base: Checkpoint) -> None:
    """Refuse the magnitudes of a DoRA on a weight that the small model has changed."""
    if name not in base or name not in full or not torch.equal(base.read(name), full.read(name)):
        raise CompressError(
            f"The DoRA magnitude of {name} cannot be recovered: the small model has another weight than the full one, "
            "and magnitudes belong to the norms of the weight they were trained on.",
            "Train a plain LoRA.",
        )


def _moved(trained: Tensor, name: str, full: Checkpoint, base: Checkpoint) -> Tensor:
    """The full model's tensor plus what training changed in the small one; sums in float32."""
    there = name in full and name in base and base.dtype(name).is_floating_point
    if not there or not full.shape(name) == base.shape(name) == tuple(trained.shape):
        raise CompressError(
            f"The trained {name} cannot be recovered: the full and the small model do not both have it.",
            "Train a plain LoRA.",
        )
    return (full.read(name).float() + (trained.float() - base.read(name).float())).to(trained.dtype)


def _plain_start(scalings: Mapping[str, Scaling]) -> dict[str, Any]:
    """Config entries of what is an ordinary LoRA now; a special start would make PEFT change the base."""
    return {
        **scaling_entries(scalings),
        "init_lora_weights": True,
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
