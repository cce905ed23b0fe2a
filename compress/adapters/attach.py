"""Attach LoRA factors to a model: from zero, or from the low-rank part of an LQ decomposition."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.adapters.adapter_file import PREFIX, AdapterFile, Scaling, scaling_entries, write_adapter
from compress.adapters.factors import factor_product
from compress.adapters.masked import mask_adapters
from compress.errors import CompressError, UsageError
from compress.importance.modules import lora_factors
from compress.model.architecture import Architecture
from compress.prune.weight_masks import load_masks
from compress.quantize.linear import LQLinear


def attach_lora(
    model: nn.Module,
    arch: Architecture,
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.05,
    targets: Sequence[str] | None = None,
    seed: int = 0,
) -> PeftModel:
    """Freeze ``model`` and give its decoder linears LoRA factors in float32: A random under ``seed``, B zero.

    Args:
        model: A causal language model; it is wrapped in place.
        arch: Its architecture (of the pruned model for a pruned model).
        rank: r.
        alpha: The delta is ``alpha / r * B A``.
        dropout: On the adapters' inputs, in training.
        targets: Linears to adapt, by role ("q"), name ("self_attn.q_proj") or last part of it ("q_proj");
            "lm_head" where it is not tied. None: every decoder linear.
        seed: Of the initial A.

    Raises:
        UsageError: A rank below 1, or a target the model has not got.
    """
    if rank < 1:
        raise UsageError(f"The LoRA rank is {rank}.", "Give a rank of at least 1.")
    modules = _target_modules(arch, targets)
    scalings = {name: Scaling(rank=rank, alpha=alpha, rank_stabilized=False) for name in modules}
    return _attach(model, scalings, dropout, seed)


def attach_factors(
    model: nn.Module, arch: Architecture, *, rank: int = 8, alpha: float = 16, seed: int = 0
) -> tuple[PeftModel, dict[str, Tensor]]:
    """Move the factors of an LQ model into adapters (LQ-LoRA, arXiv 2311.12023 §3.1): only ``L1, L2`` train.

    With the scale ``s = alpha / rank``: ``A0 = L2 / sqrt(s)``, ``B0 = L1 / sqrt(s)``, and the layer's own
    factors are switched off, so that the model computes what it did before. A matrix of rank zero gets an
    ordinary LoRA of ``rank`` (A random under ``seed``, B zero). No dropout: it would act on a part of the
    base.

    Returns:
        The model, and the initial factors of every non-zero matrix, named as in the adapter file: give them
        to ``save_adapter``, recovery needs them (METHODS §2.4).

    Raises:
        CompressError: ``model`` is not an LQ model.
        UsageError: A rank below 1.
    """
    if rank < 1:
        raise UsageError(f"The LoRA rank is {rank}.", "Give a rank of at least 1.")
    scale = alpha / rank
    scalings: dict[str, Scaling] = {}
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    for name in _target_modules(arch, None):
        factors = _lq_linear(model, name).factors()
        if factors is not None:
            starts[name] = (factors[1].float() / math.sqrt(scale), factors[0].float() / math.sqrt(scale))
        own_rank = rank if factors is None else factors[1].shape[0]
        scalings[name] = Scaling(rank=rank, alpha=alpha, rank_stabilized=False).with_rank(own_rank)
    switch_off_factors(model, starts)
    peft_model = _attach(model, scalings, 0.0, seed)
    initial: dict[str, Tensor] = {}
    for name, (factor_a, factor_b) in starts.items():
        layer = peft_model.get_base_model().get_submodule(name)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(factor_a)
            layer.lora_B["default"].weight.copy_(factor_b)
        initial[f"{PREFIX}{name}.lora_A.weight"] = factor_a.cpu()
        initial[f"{PREFIX}{name}.lora_B.weight"] = factor_b.cpu()
    return peft_model, initial


def save_adapter(
    peft_model: PeftModel, out: Path, *, base_name: str, initial: Mapping[str, Tensor] | None = None
) -> Path:
    """Write the adapter as a PEFT folder that names ``base_name`` as its base; returns ``out``.

    Args:
        peft_model: A model from ``attach_lora`` or ``attach_factors``.
        out: Folder to write.
        base_name: Model id or name of the base; never a path of this machine.
        initial: What ``attach_factors`` returned.
    """
    tensors = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    config = {**peft_model.peft_config["default"].to_dict(), "inference_mode": True}
    config["base_model_name_or_path"] = base_name
    return write_adapter(out, config, tensors, initial)


def load_adapter(model: nn.Module, path: Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter back on the model it was trained on.

    The result is in eval mode. An adapter with initial factors replaces the LQ model's own, so those are
    switched off; stock PEFT would add both. One with masks computes with its masked product; stock PEFT would
    take all of it.
    """
    with AdapterFile(path) as file:
        switch_off_factors(model, file.initial_modules)
    with _peft_notice_off():
        peft_model: PeftModel = PeftModel.from_pretrained(model, str(path), is_trainable=trainable).eval()
    masks = load_masks(path)
    if masks is not None:
        mask_adapters(peft_model, masks)
    return peft_model


def lora_delta(peft_model: PeftModel, module_name: str) -> Tensor | None:
    """``s B A`` of one linear in float32, [out, in] whatever its storage; None where it has no adapter."""
    factors = lora_factors(peft_model.get_base_model().get_submodule(module_name), module_name)
    if factors is None:
        return None
    return factor_product(factors.a.detach(), factors.b.detach(), factors.scaling)


def switch_off_factors(model: nn.Module, names: Iterable[str]) -> None:
    """Let the named LQ linears compute with their quantized part only."""
    for name in names:
        _lq_linear(model, name).use_factors = False


def _lq_linear(model: nn.Module, name: str) -> LQLinear:
    module = model.get_submodule(name)
    if not isinstance(module, LQLinear):
        raise CompressError(f"{name} is not an LQ linear.", "Quantize the model first, or attach a LoRA.")
    return module


def _target_modules(arch: Architecture, targets: Sequence[str] | None) -> list[str]:
    """Names of the modules to adapt, in layer order."""
    there = [spec for spec in arch.linears if any(spec in arch.linears_at(i) for i in range(arch.layers))]
    known = {label: spec for spec in there for label in (spec.role, spec.name, spec.name.rpartition(".")[2])}
    chosen = there if targets is None else [known[t] for t in targets if t in known]
    unknown = [t for t in targets or () if t not in known and not (t == "lm_head" and not arch.tied)]
    if unknown:
        offered = ", ".join(spec.role for spec in there) + ("" if arch.tied else ", lm_head")
        raise UsageError(
            f"This model has no adapter target {', '.join(unknown)}.", f"Choose among {offered}."
        )
    names = [
        arch.module_name(layer, spec)
        for layer in range(arch.layers)
        for spec in dict.fromkeys(chosen)
        if spec in arch.linears_at(layer)
    ]
    return names + [arch.lm_head.removesuffix(".weight")] * ("lm_head" in (targets or ()))


def _attach(model: nn.Module, scalings: Mapping[str, Scaling], dropout: float, seed: int) -> PeftModel:
    entries = scaling_entries(scalings)
    config = LoraConfig(
        **entries,
        lora_dropout=dropout,
        target_modules=_short_names(model, scalings),
        # an LQ linear is an ordinary one, whatever it replaced
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in scalings),
        task_type="CAUSAL_LM",
    )
    with (
        _peft_notice_off(),
        torch.random.fork_rng(devices=[]),
    ):  # PEFT draws from the global generator; ours replaces the values
        peft_model = get_peft_model(model, config)
    peft_model.peft_config["default"].base_model_name_or_path = ""  # PEFT took the folder the model came from
    peft_model.train(model.training)  # new dropout layers start in training mode
    generator = torch.Generator().manual_seed(seed)
    for factor_a in _factors_a(peft_model, scalings):
        bound = 1 / math.sqrt(factor_a.shape[1])  # PEFT's own start: kaiming_uniform with a = sqrt(5)
        noise = torch.rand(factor_a.shape, generator=generator) * (2 * bound) - bound
        with torch.no_grad():
            factor_a.copy_(noise)
    return peft_model


@contextmanager
def _peft_notice_off() -> Iterator[None]:
    """PEFT asks every model for an attribute that transformers has renamed; users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


def _factors_a(peft_model: PeftModel, names: Iterable[str]) -> Iterator[Tensor]:
    for name in names:
        layer: Any = peft_model.get_base_model().get_submodule(name)
        yield layer.lora_A["default"].weight


def _short_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Target names for PEFT: their last parts where those hit no other module, else in full."""
    wanted = set(names)
    last = {name.rpartition(".")[2] for name in wanted}
    hit = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if hit == wanted else wanted)
