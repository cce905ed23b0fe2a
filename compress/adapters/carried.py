"""What an adapter holds beside its factor pairs, and where it comes from: carried to the full model, or refused."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from compress.adapters.adapter_file import BASE_KEY, STRUCTURE_KEY, AdapterFile, owner
from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint
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
            "Convert it with PEFT's path_initial_model_for_weight_conversion first.",
        )
    if small.config.get("use_dora") and (compress_rank is not None or small.has_initial_factors):
        raise CompressError(
            "The factors of a DoRA adapter cannot be changed: its magnitudes belong to them.",
            "Train a LoRA without DoRA.",
        )


def check_origin(small: AdapterFile, structure: StructureMap) -> None:
    """Refuse an adapter that says it was trained on another small model; one that says nothing is compared by shape.

    Raises:
        CompressError: The full model behind it, or what it keeps, is another.
    """
    base, digest = small.origin.get(BASE_KEY), small.origin.get(STRUCTURE_KEY)
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


def carried_over(
    small: AdapterFile, changed: Collection[str], full: Checkpoint, base: Checkpoint | None
) -> dict[str, Tensor]:
    """Every tensor of an adapter but the factor pairs and biases of LoRA, for the full model.

    Args:
        small: The adapter.
        changed: Modules that pruning has cut.
        full: The full model.
        base: The model the adapter was trained on; None: taken to be the full one outside of ``changed``.

    Raises:
        CompressError: A tensor belongs to a module that was cut, or to a weight that the small model has changed.
    """
    copies: dict[str, Tensor] = {}
    for name in small.names:
        module, kind = owner(name)
        if kind in ("lora_A.weight", "lora_B.weight", "lora_B.bias"):
            continue
        if module in changed:
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
