"""What an adapter holds beside its factor pairs, and where it comes from: carried to the full model, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.adapters.adapter_file import BASE_KEY, STRUCTURE_KEY, TRAINED_TOKENS, AdapterFile, owner
from compress.adapters.initial_factors import INITIAL_FILE
from compress.adapters.places import Place
from compress.errors import CompressError
from compress.model.base_record import FILE_NAME as BASE_FILE
from compress.model.base_record import BaseRecord
from compress.model.checkpoint import Checkpoint
from compress.structure import FILE_NAME as STRUCTURE_FILE
from compress.structure import StructureMap

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` that move a part of the base weight into the factors."""


def check_kind(small: AdapterFile, compress_rank: int | None) -> None:
    """Refuse an adapter whose delta cannot be told from its base, or whose factors must stay what they are.

    Raises:
        CompressError: It started from a part of its base and that start was not kept; or it is a DoRA and its factors
            would have to change.
    """
    start = small.config.get("init_lora_weights")
    unknown = sorted(set(small.modules) - set(small.initial_modules))
    if isinstance(start, str) and start.startswith(_BASE_CHANGING) and unknown:
        raise CompressError(
            f"The adapter started from {start} factors, which hold a part of its base, and those of {unknown[0]} "
            "were not kept.",
            f"Save them as {INITIAL_FILE} beside it (the tutorial on LoRAM says how), or convert it with PEFT's "
            "path_initial_model_for_weight_conversion.",
        )
    if small.config.get("use_dora") and (compress_rank is not None or small.has_initial_factors):
        raise CompressError(
            "The factors of a DoRA adapter cannot be changed: its magnitudes belong to them.",
            "Train a LoRA without DoRA.",
        )


def known_origin(small: AdapterFile) -> Mapping[str, Any]:
    """The small model behind an adapter: what it says itself, else what stands in the folder that PEFT wrote down.

    Returns:
        ``BASE_KEY`` and ``STRUCTURE_KEY``, or nothing: a folder that is not here, or a model that was never cut.
    """
    if small.origin:
        return small.origin
    name = small.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name or not (Path(name) / STRUCTURE_FILE).is_file():
        return {}
    found = StructureMap.load(Path(name) / STRUCTURE_FILE)
    return {BASE_KEY: found.base_fingerprint, STRUCTURE_KEY: found.digest()}


def check_origin(small: AdapterFile, structure: StructureMap, full: Checkpoint) -> bool:
    """Refuse an adapter that was trained on another small model; one of unknown origin is compared by shape alone.

    Args:
        small: The adapter.
        structure: What pruning kept.
        full: The full model, read only to say what in it is another.

    Returns:
        Whether the origin is known.

    Raises:
        CompressError: The full model behind it, or what it keeps, is another; names the first tensor that differs,
            where ``base.json`` is there.
    """
    origin = known_origin(small)
    base, digest = origin.get(BASE_KEY), origin.get(STRUCTURE_KEY)
    if base is not None and base != structure.base_fingerprint:
        raise CompressError(
            f"The adapter {small.path} was trained on a model made of another full model"
            f"{_difference(small, base, full)}.",
            "Give the adapter and the small model that belong together.",
        )
    if digest is not None and digest != structure.digest():
        raise CompressError(
            f"The adapter {small.path} was trained on a small model that keeps other groups or channels.",
            "Give the adapter and the small model that belong together.",
        )
    return digest is not None


def _difference(small: AdapterFile, base: str, full: Checkpoint) -> str:
    """Which one, and what in ours is another; empty where it is not known."""
    file = small.path / BASE_FILE
    record = BaseRecord.load(file) if file.is_file() else None
    if record is None or record.fingerprint != base:
        return ""
    difference = record.difference(full.digests())
    return f", {record.name}" + (f": of ours {difference}" if difference else "")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Carried:
    """A tensor for the full model: what it is, and how to make it when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def carried_over(
    small: AdapterFile, places: Mapping[str, Place], full: Checkpoint, base: Checkpoint | None
) -> dict[str, Carried]:
    """Every tensor of an adapter but the factor pairs and biases of LoRA, for the full model.

    Args:
        small: The adapter.
        places: Of the modules that pruning may have cut.
        full: The full model.
        base: The model the adapter was trained on; None: taken to be what pruning left of the full one.

    Raises:
        CompressError: A tensor belongs to a module that was cut, to a weight that the small model has changed, or is
            of a kind that is not known.
    """
    found: dict[str, Carried] = {}
    for name in small.names:
        module, kind = owner(name)
        if kind in ("lora_A.weight", "lora_B.weight", "lora_B.bias"):
            continue
        shape, dtype = small.spec(name)
        make = partial(small.read, name)
        place = places.get(module)
        if place is not None and place.changed and kind != "bias":
            _refuse_cut(module, kind)
        if kind == "lora_magnitude_vector" and base is not None:
            _check_same(f"{module}.weight", full, base)
        if kind == "bias" and place is not None and place.rows is not None:
            target = f"{module}.bias"
            _check_both(target, full, base, (place.shape[0],), shape)
            make, shape = partial(_scattered, small, name, target, full, base, place.rows), (place.shape[0],)
        elif kind in ("weight", "bias") and base is not None:
            _check_both(f"{module}.{kind}", full, base, shape, shape)
            make = partial(_moved, small, name, f"{module}.{kind}", full, base)
        elif kind == TRAINED_TOKENS:
            rows, target = _token_rows(small, module), f"{module}.weight"
            if target not in full or shape != (len(rows), *full.shape(target)[1:]):
                _refuse_missing(name)
            if base is not None:
                _check_both(target, full, base, full.shape(target), full.shape(target))
                make = partial(_moved_rows, small, name, target, full, base, torch.tensor(rows))
        elif not kind:
            raise CompressError(
                f"The adapter's tensor {name} cannot be recovered: it is of a kind that is not known.",
                "Train a plain LoRA.",
            )
        found[name] = Carried(shape=shape, dtype=dtype, make=make)
    return found


def whole_tensors(small: AdapterFile) -> tuple[str, ...]:
    """Names, in the model, of the tensors that an adapter carries whole or by rows: biases, norms, embeddings."""
    owners = {owner(name) for name in small.names}
    kinds = {"weight": "weight", "bias": "bias", TRAINED_TOKENS: "weight"}
    return tuple(sorted({f"{module}.{kinds[kind]}" for module, kind in owners if kind in kinds}))


def _refuse_cut(module: str, kind: str) -> None:
    what, why = "trained base tensor", "its pruned part was never trained"
    if kind == "lora_magnitude_vector":
        what, why = "DoRA magnitude", "it was trained for the norms of the pruned weight"
    raise CompressError(
        f"The {what} of {module} cannot be recovered: {why}.", "Train a plain LoRA on pruned linears."
    )


def _check_same(name: str, full: Checkpoint, base: Checkpoint) -> None:
    """Refuse the magnitudes of a DoRA on a weight that the small model has changed."""
    if name not in base or name not in full or not torch.equal(base.read(name), full.read(name)):
        raise CompressError(
            f"The DoRA magnitude of {name} cannot be recovered: the small model has another weight than the full one, "
            "and magnitudes belong to the norms of the weight they were trained on.",
            "Train a plain LoRA.",
        )


def _check_both(
    name: str, full: Checkpoint, base: Checkpoint | None, wanted: tuple[int, ...], small: tuple[int, ...]
) -> None:
    """Refuse a trained tensor unless the full model has it in one shape and the small one in the other."""
    there = name in full and full.shape(name) == wanted
    if base is not None:
        there = there and name in base and base.shape(name) == small and base.dtype(name).is_floating_point
    if not there:
        _refuse_missing(name)


def _refuse_missing(name: str) -> None:
    raise CompressError(
        f"The trained {name} cannot be recovered: the full and the small model do not both have it.",
        "Train a plain LoRA.",
    )


def _moved(small: AdapterFile, name: str, target: str, full: Checkpoint, base: Checkpoint) -> Tensor:
    """The full model's tensor plus what training changed in the small one; sums in float32."""
    trained = small.read(name)
    change = trained.float() - base.read(target).float()
    return (full.read(target).float() + change).to(trained.dtype)


def _scattered(
    small: AdapterFile, name: str, target: str, full: Checkpoint, base: Checkpoint | None, rows: Tensor
) -> Tensor:
    """The full model's bias, with what training changed in the small one at ``rows``."""
    trained, whole = small.read(name), full.read(target).float()
    kept = whole[rows]
    before = kept if base is None else base.read(target).float()
    # a difference of the same numbers is zero: bit by bit what was trained, where the two models agree
    whole[rows] = trained.float() + (kept - before)
    return whole.to(trained.dtype)


def _moved_rows(
    small: AdapterFile, name: str, target: str, full: Checkpoint, base: Checkpoint, rows: Tensor
) -> Tensor:
    """The full model's rows of the trained tokens plus what training changed in the small one's."""
    trained = small.read(name)
    change = trained.float() - base.read(target)[rows].float()
    return (full.read(target)[rows].float() + change).to(trained.dtype)


def _token_rows(small: AdapterFile, module: str) -> list[int]:
    """The tokens whose rows of ``module`` were trained, as PEFT reads its config: a list is of the embedding."""
    given = small.config.get("trainable_token_indices") or {}
    if isinstance(given, list):
        return given
    names = [name for name in given if module == name or module.endswith(f".{name}")]
    return list(given[names[0]]) if names else []
