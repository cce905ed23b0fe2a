"""Hugging Face configs as dictionaries: build the class, and read a model's shapes without its weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from compress.errors import CompressError
from compress.model.layout import Shapes
from compress.model.uneven import CLASS_PREFIX, PREFIX

_KEPT = 64
_SHAPES: dict[tuple[type, str], Shapes] = {}

_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def build_config(config: Mapping[str, Any]) -> Any:
    """The transformers config object of ``config`` (the content of a config.json), defaults filled in.

    That of an uneven model is of a subclass of its family's, which keeps the model type and the layers' sizes.

    Raises:
        CompressError: The model type is missing or unknown to transformers, or its validator refuses a value.
    """
    values = copy.deepcopy(dict(config))  # transformers rewrites the rope entries in place
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or not model_type:
        raise CompressError(
            "The config names no model_type.", "Use a Hugging Face model folder with its own config.json."
        )
    family = model_type.removeprefix(PREFIX)
    if family not in CONFIG_MAPPING_NAMES:
        raise CompressError(
            f"The installed transformers knows no model type {model_type!r}.",
            "Use a model that transformers supports without remote code, or a newer transformers.",
        )
    try:
        if family == model_type:
            return AutoConfig.for_model(model_type, **values)
        base = CONFIG_MAPPING[family]
        return type(CLASS_PREFIX + base.__name__, (base,), {"model_type": model_type})(**values)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        reason = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ").rstrip(".")
        raise CompressError(
            f"The {model_type} config is not valid: {reason}.",
            "Correct config.json, or choose another shape.",
        ) from error


def shallow_config(config: Any, layers: int) -> Any:
    """A copy of a config object with at most ``layers`` layers, per-layer lists shortened to match."""
    total = int(config.num_hidden_layers)
    small = copy.deepcopy(config)
    keep = min(layers, total)
    for key, value in list(vars(small).items()):
        if isinstance(value, list) and len(value) == total:
            setattr(small, key, value[:keep])
    small.num_hidden_layers = keep
    return small


def meta_model(config: Any) -> Any:
    """The causal language model of a config object on the meta device: shapes and names, no weights.

    Raises:
        CompressError: transformers has no causal language model for this config, or cannot build it.
    """
    plain = copy.deepcopy(config)
    vars(plain).pop("quantization_config", None)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return AutoModelForCausalLM.from_config(plain)
    except ValueError as error:
        raise CompressError(
            f"transformers has no causal language model for model type {config.model_type!r}.",
            "Use a decoder-only text model.",
        ) from error
    except (TypeError, KeyError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
        # Sizes that no tensor can have, and settings that transformers looks at only when it builds the layers.
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CompressError(
            f"A {config.model_type} model cannot be built from its config ({type(error).__name__}: {reason}).",
            "Correct config.json, or use a checkpoint whose config.json belongs to its weights.",
        ) from error


def meta_shapes(config: Any) -> Shapes:
    """Name and shape of every parameter (tied ones once) that transformers builds from a config object.

    The last ones are kept: a search for a shape asks again and again for those of a few configs.

    Raises:
        CompressError: As `meta_model`.
    """
    values = config.to_dict()
    values.pop("quantization_config", None)
    key = (type(config), json.dumps(values, sort_keys=True, default=repr))
    found = _SHAPES.pop(key, None)
    if found is None:
        found = {name: tuple(parameter.shape) for name, parameter in meta_model(config).named_parameters()}
    _SHAPES[key] = found  # the last one used comes last
    if len(_SHAPES) > _KEPT:
        del _SHAPES[next(iter(_SHAPES))]
    return dict(found)


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The ``quant_method`` that a config.json declares, or None for plain weights."""
    declared = config.get("quantization_config")
    if declared is None:
        return None
    method = declared.get("quant_method") if isinstance(declared, Mapping) else None
    return str(method) if method else "unknown"


def refuse_quantized(config: Mapping[str, Any], *, allow_lq: bool = True) -> None:
    """Refuse a checkpoint whose weights are stored quantized (by another method than ours).

    Raises:
        CompressError: ``quantization_config`` names a method (other than "lq" with ``allow_lq``).
    """
    method = quantization_method(config)
    if method is None or (allow_lq and method == "lq"):
        return
    raise CompressError(
        f"The checkpoint is already quantized (method {method!r}), and this step needs its plain weights.",
        "Start from the original bf16, fp16 or fp32 checkpoint.",
    )


def refuse_experts(config: Any) -> None:
    """Refuse a mixture of experts, a multimodal model or an encoder-decoder, by what its config object says.

    Raises:
        CompressError: The sentence names what is missing to support it.
    """
    for key in _EXPERT_KEYS:
        experts = getattr(config, key, None)
        if isinstance(experts, int) and experts > 1:
            raise CompressError(
                f"The model type {config.model_type!r} is a mixture of {experts} experts, and "
                "rules for expert weights and their router are missing here.",
                "Use a dense model.",
            )
    if getattr(config, "text_config", None) is not None:
        raise CompressError(
            f"The model type {config.model_type!r} is multimodal, and only text decoders are supported.",
            "Use the text-only checkpoint of this model.",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise CompressError(
            f"The model type {config.model_type!r} is an encoder-decoder, and only decoders are supported.",
            "Use a decoder-only model.",
        )
