"""Put an adapter trained on the pruned model onto the full one (LoRAM, arXiv 2502.13533 §3)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.adapters.adapter_file import (
    WEIGHTS_FILE,
    AdapterFile,
    Scaling,
    owner,
    scaling_entries,
    write_config,
)
from compress.adapters.carried import carried_over, check_kind, check_origin
from compress.adapters.factors import Recompressed, scatter_rows
from compress.adapters.initial_factors import PREFIX, pair_of
from compress.adapters.lanes import device_lanes
from compress.adapters.places import Place, places_of
from compress.adapters.recompressed import Trained, recompressed
from compress.errors import CompressError, UsageError
from compress.model.architecture import Architecture
from compress.model.checkpoint import Checkpoint
from compress.model.placed import PlacedWriter, Spec
from compress.model.uneven_config import refuse_uneven
from compress.progress import Progress
from compress.structure import StructureMap


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """What recovery wrote.

    Attributes:
        modules: Modules with a factor pair.
        scattered: Of them, how many changed shape.
        differences: Of them, how many are the difference ``B A - B0 A0`` to non-zero initial factors.
        max_rank: Largest rank in the recovered adapter.
        uncut_rank: Largest rank there would be without re-compression.
        parameters: Numbers stored in it.
        delta_norm: Frobenius norm of all deltas ``scaling * B A`` together.
        truncation: Module -> relative error ``||D - D_r||_F / ||D||_F`` of the re-compressed delta D; empty
            without re-compression.
        truncation_overall: The same over all modules together; 0 without re-compression.
        origin_known: Whether the adapter, or the folder it names as its base, says which small model it belongs to.
    """

    modules: int
    scattered: int
    differences: int
    max_rank: int
    uncut_rank: int
    parameters: int
    delta_norm: float
    truncation: Mapping[str, float]
    truncation_overall: float
    origin_known: bool


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
    difference ``B A - B0 A0`` with rank r + r0, because the full base holds ``B0 A0`` already (METHODS §2.4). Nothing
    is written before all of it has been checked; then one module is in memory at a time.

    Args:
        small_adapter: PEFT folder, with ``initial_factors.safetensors`` when it did not start from zero.
        structure: What pruning kept.
        arch_full: Architecture of the full model.
        full: The full model; gives the shapes of adapted linears outside of the decoder layers.
        out: Folder to write.
        full_name: What ``adapter_config.json`` names as its base (never the pruned model).
        small_base: The model the adapter was trained on. Whole trained tensors (embeddings or rows of them, norms,
            biases) then become the full model's own plus what training changed; without it they are copied, which is
            right only where the two models have the same.
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
    places = places_of(arch_full, structure)
    with AdapterFile(small_adapter) as small:
        if not small.modules:
            raise CompressError(f"The adapter {small_adapter} has no LoRA factors.", "Train a LoRA.")
        # trained on LQ linears it says no, although the full model's own are stored transposed
        transposed = small.transposed or any(spec.transposed for spec in arch_full.linears)
        check_kind(small, compress_rank)
        origin_known = check_origin(small, structure, full)
        carried = carried_over(small, places, full, small_base)
        for module in small.modules:
            places[module] = places.get(module) or _outside(full, arch_full, module, transposed)
        made = [_trained(small, module, places[module]) for module in small.modules]
        scalings = {one.module: _scaling(small, one, compress_rank) for one in made}
        specs: dict[str, Spec] = {name: (one.shape, one.dtype) for name, one in carried.items()}
        for one in made:
            specs |= _specs(small, one, places[one.module], scalings[one.module].rank)
        config = {**small.config, "base_model_name_or_path": full_name, "revision": None}
        config["fan_in_fan_out"] = transposed
        gone = replace(arch_full, layer_shapes=structure.shapes).gone()
        if gone:
            config["exclude_modules"] = _excluding(config.get("exclude_modules"), gone)
        if compress_rank is not None or any(one.started for one in made):
            config |= _plain_start(scalings | _embeddings(small))
        norms: dict[str, tuple[float, float]] = {}
        out.mkdir(parents=True, exist_ok=True)
        with PlacedWriter(out / WEIGHTS_FILE, specs) as writer:
            for name, copied in carried.items():
                writer.put(name, copied.make())
            with closing(recompressed(made, compress_rank, device_lanes(device))) as deltas:
                for one, delta in zip(made, deltas, strict=True):
                    _write(writer, small, one.module, places[one.module], delta)
                    square = scalings[one.module].value ** 2
                    norms[one.module] = square * delta.norm, square * delta.lost
                    if progress is not None:
                        progress(len(norms), len(made), one.module)
    write_config(out, config)
    norm, lost = (sum(pair[side] for pair in norms.values()) for side in (0, 1))
    return RecoveryReport(
        modules=len(made),
        scattered=sum(places[one.module].changed for one in made),
        differences=sum(one.started for one in made),
        max_rank=max(scaling.rank for scaling in scalings.values()),
        uncut_rank=max(one.rank for one in made),
        parameters=sum(prod(shape) for shape, _ in specs.values()),
        delta_norm=math.sqrt(max(0.0, norm - lost)),
        truncation={m: _relative(lost, norm) for m, (norm, lost) in norms.items()} if compress_rank else {},
        truncation_overall=_relative(lost, norm),
        origin_known=origin_known,
    )


def _trained(small: AdapterFile, module: str, place: Place) -> Trained:
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


def _scaling(small: AdapterFile, made: Trained, rank: int | None) -> Scaling:
    """Rank and alpha of a recovered module; the value of the scaling stays."""
    scaling = small.scaling(made.module)
    for now in (made.rank, made.kept(rank)):
        scaling = scaling if now == scaling.rank else scaling.with_rank(now)
    return scaling


def _embeddings(small: AdapterFile) -> dict[str, Scaling]:
    """Those of the embeddings that are adapted: copied, whatever ranks the linears get."""
    owners = (owner(name) for name in small.names)
    return {module: small.scaling(module) for module, kind in owners if kind == "lora_embedding_A"}


def _specs(small: AdapterFile, made: Trained, place: Place, rank: int) -> dict[str, Spec]:
    """Shapes and dtypes of what `_write` writes."""
    name_a, name_b = pair_of(made.module)
    found: dict[str, Spec] = {
        name_a: ((rank, place.shape[1]), made.specs[0].dtype),
        name_b: ((place.shape[0], rank), made.specs[1].dtype),
    }
    bias = f"{PREFIX}{made.module}.lora_B.bias"
    if bias in small.names:
        found[bias] = ((place.shape[0],), small.spec(bias)[1])
    return found


def _write(writer: PlacedWriter, small: AdapterFile, module: str, place: Place, found: Recompressed) -> None:
    # after the cut: the zero rows and columns that are put in change no singular value
    name_a, name_b = pair_of(module)
    writer.put(name_a, scatter_rows(found.a.T, place.columns, place.shape[1]).T)
    writer.put(name_b, scatter_rows(found.b, place.rows, place.shape[0]))
    bias = f"{PREFIX}{module}.lora_B.bias"
    if bias in small.names:
        writer.put(bias, scatter_rows(small.read(bias), place.rows, place.shape[0]))


def _outside(full: Checkpoint, arch: Architecture, module: str, transposed: bool) -> Place:
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
    return Place(shape=(columns, rows) if flip else (rows, columns))


def _check_fits(module: str, width: int, kept: Tensor | None, size: int, label: str) -> None:
    expected = size if kept is None else len(kept)
    if width != expected:
        raise CompressError(
            f"The adapter of {module} has {width} {label} where the structure keeps {expected}.",
            "Recover where the small model is that the adapter was trained on, or give another adapter.",
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
