"""Attach LoRA factors to a model: from zero, from an LQ model's low-rank part, or from the weights' own (PiSSA)."""

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

from compress.adapters.adapter_file import (
    STARTED_KEY,
    AdapterFile,
    Scaling,
    origin_of,
    scaling_entries,
    write_adapter,
)
from compress.adapters.factors import factor_product
from compress.adapters.filled import filled_adapter
from compress.adapters.initial_factors import PREFIX
from compress.adapters.masked import mask_adapters
from compress.adapters.starts import lq_linear, switch_off_factors, take_out
from compress.errors import CompressError, UsageError
from compress.importance.modules import lora_factors
from compress.model.architecture import Architecture
from compress.prune.weight_masks import load_masks
from compress.quantize.embedding import LQTiedHead
from compress.quantize.linear import LQLinear
from compress.structure import StructureMap

PISSA = "pissa"
"""PEFT's name of the start from the leading singular directions of the weights."""


def attach_lora(
    model: nn.Module,
    arch: Architecture,
    *,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.05,
    targets: Sequence[str] | None = None,
    rank_stabilized: bool = False,
    seed: int = 0,
) -> PeftModel:
    """Freeze ``model`` and give its decoder linears LoRA factors in float32: A random under ``seed``, B zero.

    Args:
        model: A causal language model; it is wrapped in place.
        arch: Its architecture (of the pruned model for a pruned model).
        rank: r.
        alpha: The delta is ``alpha / r * B A``.
        dropout: On the adapters' inputs, in training.
        targets: Linears to adapt, by role ("q"), name ("self_attn.q_proj") or last part of it ("q_proj"); "all" for
            every decoder linear, "lm_head" for the output matrix. None: every decoder linear.
        rank_stabilized: The delta is ``alpha / sqrt(r) * B A`` instead (rsLoRA, arXiv 2312.03732).
        seed: Of the initial A.

    Raises:
        UsageError: A rank below 1, or a target the model has not got.
    """
    if rank < 1:
        raise UsageError(f"The LoRA rank is {rank}.", "Give a rank of at least 1.")
    modules = target_modules(arch, targets)
    scaling = Scaling(rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)
    return _attach(model, dict.fromkeys(modules, scaling), dropout, seed)


def attach_pissa(
    model: nn.Module,
    arch: Architecture,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] | None = None,
    rank_stabilized: bool = False,
) -> tuple[PeftModel, dict[str, Tensor]]:
    """Move the leading singular directions of each weight into its adapter (PiSSA, arXiv 2404.02948), by PEFT.

    The base keeps what is left, so the model computes what it did before. No dropout: it would act on the base.

    Returns:
        The model, and the initial factors, named as in the adapter file: give them to ``save_adapter``, recovery
        needs them (METHODS §2.4).

    Raises:
        CompressError: A base weight is quantized, or the output matrix is adapted while it is tied to the embedding.
        UsageError: A rank below 1, or a target the model has not got.
    """
    if rank < 1:
        raise UsageError(f"The LoRA rank is {rank}.", "Give a rank of at least 1.")
    modules = target_modules(arch, targets)
    if arch.tied and arch.lm_head.removesuffix(".weight") in modules:
        raise CompressError(
            "The output matrix is tied to the embedding, so PiSSA cannot take a part out of it.",
            "Leave lm_head out of the targets, or use LoRA.",
        )
    for name in modules:
        if isinstance(model.get_submodule(name), LQLinear):
            raise CompressError(
                f"PiSSA takes a part out of each weight, and {name} is quantized.",
                "Use --method lq, which starts from the quantized model's own factors, or --method lora.",
            )
    scaling = Scaling(rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)
    peft_model = _attach(model, dict.fromkeys(modules, scaling), 0.0, None, start=PISSA)
    initial: dict[str, Tensor] = {}
    for name in modules:
        layer: Any = peft_model.get_base_model().get_submodule(name)
        for side in "AB":
            factor = getattr(layer, f"lora_{side}")["default"].weight
            initial[f"{PREFIX}{name}.lora_{side}.weight"] = factor.detach().clone().cpu()
    return peft_model, initial


def attach_factors(
    model: nn.Module,
    arch: Architecture,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] | None = None,
    rank_stabilized: bool = False,
    seed: int = 0,
) -> tuple[PeftModel, dict[str, Tensor]]:
    """Move the factors of an LQ model into adapters (LQ-LoRA, arXiv 2311.12023 §3.1): only ``L1, L2`` train.

    With the scale ``s = alpha / rank`` (or that of rsLoRA): ``A0 = L2 / sqrt(s)``, ``B0 = L1 / sqrt(s)``, and the
    layer's own factors are switched off, so that the model computes what it did before. A matrix of rank zero, and
    the output matrix, get an ordinary LoRA of ``rank`` (A random under ``seed``, B zero). No dropout: it would act
    on a part of the base.

    Returns:
        The model, and the initial factors of every non-zero matrix, named as in the adapter file: give them
        to ``save_adapter``, recovery needs them (METHODS §2.4).

    Raises:
        CompressError: ``model`` is not an LQ model.
        UsageError: A rank below 1, or a target the model has not got.
    """
    if rank < 1:
        raise UsageError(f"The LoRA rank is {rank}.", "Give a rank of at least 1.")
    plain = Scaling(rank=rank, alpha=alpha, rank_stabilized=rank_stabilized)
    scalings: dict[str, Scaling] = {}
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    for name in target_modules(arch, targets):
        head = name == arch.lm_head.removesuffix(".weight")
        factors = None if head else lq_linear(model, name).factors()
        if factors is not None:
            root = math.sqrt(plain.value)
            starts[name] = (factors[1].float() / root, factors[0].float() / root)
        scalings[name] = plain if factors is None else plain.with_rank(factors[1].shape[0])
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
    peft_model: PeftModel,
    out: Path,
    *,
    base_name: str,
    initial: Mapping[str, Tensor] | None = None,
    base: StructureMap | str | None = None,
) -> Path:
    """Write the adapter as a PEFT folder that names ``base_name`` as its base; returns ``out``.

    Args:
        peft_model: A model from ``attach_lora`` or ``attach_factors``.
        out: Folder to write.
        base_name: Model id or name of the base; never a path of this machine.
        initial: What ``attach_factors`` or ``attach_pissa`` returned.
        base: What the base kept of a full model, or that model's fingerprint where it kept everything; noted, so that
            recovery can tell another one.
    """
    tensors = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    config = {**peft_model.peft_config["default"].to_dict(), "inference_mode": True}
    config["base_model_name_or_path"] = base_name
    if initial:
        started = sum(name.endswith(".lora_A.weight") for name in initial)
        config["auto_mapping"] = {**(config.get("auto_mapping") or {}), STARTED_KEY: started}
    origin = None if base is None else origin_of(base)
    return write_adapter(out, config, tensors, initial, origin)


def load_adapter(model: nn.Module, path: Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter back on the model it was trained on.

    The result is in eval mode. An adapter with initial factors replaces the LQ model's own, so those are
    switched off; stock PEFT would add both. Those of PiSSA are taken out of the base, which stock PEFT does by
    decomposing every weight again. One with masks computes with its masked product; stock PEFT would take all of it.

    Raises:
        CompressError: The adapter's modules, shapes or tensor names are not those of the model.
    """
    with AdapterFile(path) as file:  # first: it checks what PEFT would take as it is
        config = LoraConfig.from_pretrained(str(path))
        if config.init_lora_weights == PISSA:
            take_out(model, file)
            config.init_lora_weights = True
        else:
            switch_off_factors(model, file.initial_modules)
    config.inference_mode = not trainable
    with _peft_notice_off():
        peft_model = filled_adapter(model, config, path, trainable=trainable).eval()
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


def target_modules(arch: Architecture, targets: Sequence[str] | None) -> list[str]:
    """Names of the modules to adapt, in layer order; targets as in ``attach_lora``.

    Raises:
        UsageError: A target the model has not got, or none.
    """
    there = [spec for spec in arch.linears if any(spec in arch.linears_at(i) for i in range(arch.layers))]
    known = {label: spec for spec in there for label in (spec.role, spec.name, spec.name.rpartition(".")[2])}
    every = targets is None or "all" in targets
    chosen = there if every else [known[t] for t in targets or () if t in known]
    unknown = [t for t in targets or () if t not in (*known, "all", "lm_head")]
    if unknown or targets == ():
        offered = ", ".join(["all", *(spec.role for spec in there), "lm_head"])
        raise UsageError(
            f"This model has no adapter target {', '.join(unknown) or 'at all'}.", f"Choose among {offered}."
        )
    names = [
        arch.module_name(layer, spec)
        for layer in range(arch.layers)
        for spec in dict.fromkeys(chosen)
        if spec in arch.linears_at(layer)
    ]
    return names + [arch.lm_head.removesuffix(".weight")] * ("lm_head" in (targets or ()))


def _attach(
    model: nn.Module,
    scalings: Mapping[str, Scaling],
    dropout: float,
    seed: int | None,
    *,
    start: str | bool = True,
) -> PeftModel:
    """``seed`` is that of A where PEFT's ``start`` is the plain one; None leaves the factors as PEFT made them."""
    for name in scalings:
        if isinstance(model.get_submodule(name), LQTiedHead):
            raise CompressError(
                f"{name} reads the codes of the embedding, so it cannot carry an adapter of its own.",
                "Leave lm_head out of the adapter's targets, or quantize with --embeddings keep.",
            )
    # an LQ linear is an ordinary one, whatever it replaced
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in scalings)
    entries = scaling_entries(scalings)
    config = LoraConfig(
        **entries,
        use_rslora=any(scaling.rank_stabilized for scaling in scalings.values()),
        init_lora_weights=start,
        lora_dropout=dropout,
        target_modules=_short_names(model, scalings),
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    with (
        _peft_notice_off(),
        torch.random.fork_rng(devices=[]),
    ):  # PEFT draws from the global generator; ours replaces the values
        peft_model = get_peft_model(model, config)
    peft_model.peft_config["default"].fan_in_fan_out = transposed  # an lm_head beside them had it changed
    peft_model.peft_config["default"].base_model_name_or_path = ""  # PEFT took the folder the model came from
    peft_model.train(model.training)  # new dropout layers start in training mode
    if seed is None:
        return peft_model
    generator = torch.Generator().manual_seed(seed)
    for factor_a in _factors_a(peft_model, scalings):
        bound = 1 / math.sqrt(factor_a.shape[1])  # PEFT's own start: kaiming_uniform with a = sqrt(5)
        noise = torch.rand(factor_a.shape, generator=generator) * (2 * bound) - bound
        with torch.no_grad():
            factor_a.copy_(noise)
    return peft_model


@contextmanager
def _peft_notice_off() -> Iterator[None]:
    """Notices that users can do nothing about.

    PEFT asks every model for an attribute that transformers has renamed, and warns of merging an adapter of a tied
    output matrix (our merge unties it) and of linears beside Conv1Ds (an lm_head is one).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        warnings.filterwarnings(
            "ignore", "Model has .tie_word_embeddings=True. and a tied layer", UserWarning
        )
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to (True|False) but the target", UserWarning)
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
