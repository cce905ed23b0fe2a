"""Lets transformers open and save LQ checkpoints: quantization method "lq"."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.errors import CompressError
from compress.quantize.checkpoint import FORMAT_VERSION, QUANT_METHOD, MatrixRecord, read_lq_config
from compress.quantize.embedding import LQEmbedding, LQTiedHead
from compress.quantize.linear import LQLinear

_REWRITE = "Quantize the model again, or take the checkpoint from where it is complete."


class LQConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of an LQ checkpoint.

    Args:
        matrices: Record of every quantized matrix by module name, as JSON objects.
        format_version: Of the records.
        quant_method: Always "lq".

    Raises:
        CompressError: The method or the version is another.
    """

    def __init__(
        self,
        matrices: dict[str, Any],
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.format_version = format_version
        self.matrices = matrices
        self.records()

    def records(self) -> dict[str, MatrixRecord]:
        """The matrices as records."""
        return read_lq_config(self.__dict__)


class LQQuantizer(HfQuantizer):
    """Puts :class:`LQLinear` or :class:`LQEmbedding` where the checkpoint holds codes, never computed on load."""

    requires_calibration = True

    def is_serializable(self) -> bool:
        """True: what was loaded is saved bit for bit."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters train on top of the frozen codes."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        records: dict[str, MatrixRecord] = self.quantization_config.records()
        prefix = f"{model.base_model_prefix}."
        _check_files(records, kwargs.get("checkpoint_files"), prefix)
        for name, record in records.items():
            place, module = _find(model, name, prefix)
            _check_shape(name, module, record)
            dtype = kwargs.get("dtype")
            if isinstance(module, nn.Embedding):
                table = LQEmbedding.in_place_of(module, record, dtype=dtype, device="meta")
                _replace(model, place, table)
                _tie_head(model, table)
                continue
            layer = LQLinear(record, bias=module.bias is not None, dtype=dtype, device="meta")
            _replace(model, place, layer)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        tied: dict[LQEmbedding, nn.Parameter] = {}
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LQEmbedding):
                tied[layer] = _dense_embedding(model, name, layer, dtype or torch.get_default_dtype())
            elif isinstance(layer, LQTiedHead):
                _replace(model, name, _dense_linear(layer, tied[layer.owner], None))
            elif isinstance(layer, LQLinear):
                weight = layer.dequantized_weight(dtype or torch.get_default_dtype())
                _replace(
                    model, name, _dense_linear(layer, nn.Parameter(weight, requires_grad=False), layer.bias)
                )
        return model


def _dense_linear(layer: LQLinear | LQTiedHead, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = weight
    dense.register_parameter("bias", bias)
    return dense


def _dense_embedding(model: nn.Module, name: str, layer: LQEmbedding, dtype: torch.dtype) -> nn.Parameter:
    if layer.multiplier is not None:
        raise CompressError(
            f"The embedding {name} also scales its rows, which a plain one does not.",
            "Use the quantized model as it is, or the one it was made from.",
        )
    dense = nn.Embedding(layer.num_embeddings, layer.embedding_dim, device="meta")
    dense.weight = nn.Parameter(layer.dequantized_weight(dtype), requires_grad=False)
    _replace(model, name, dense)
    return dense.weight


def _tie_head(model: Any, table: LQEmbedding) -> None:
    """Where the output layer shares the embedding's weight, let it read the quantized one."""
    head = model.get_output_embeddings()
    if head is None or not model.config.get_text_config(decoder=True).tie_word_embeddings:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    _replace(model, name, LQTiedHead(table))


def _names(name: str, prefix: str) -> tuple[str, str]:
    """A module's name with and without the base model's prefix, the given one first."""
    return name, name.removeprefix(prefix) if name.startswith(prefix) else prefix + name


def _find(model: nn.Module, name: str, prefix: str) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    for place in _names(name, prefix):
        if place in modules:
            return place, modules[place]
    raise CompressError(
        f"The checkpoint quantizes {name}, which {type(model).__name__} does not have.",
        "Load it with the class named in its config.json.",
    )


def _check_shape(name: str, module: nn.Module, record: MatrixRecord) -> None:
    shape: tuple[int, ...] = ()
    if isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
    elif isinstance(module, nn.Embedding):
        shape = (module.num_embeddings, module.embedding_dim)
    elif isinstance(module, Conv1D):
        shape = tuple(reversed(module.weight.shape))
    if shape != record.shape:
        raise CompressError(
            f"The checkpoint stores {name} as {record.shape}; the model has it as {shape}.",
            "Make config.json agree with the weights: it must be the one written beside them.",
        )


def _check_files(records: dict[str, MatrixRecord], files: Iterable[str] | None, prefix: str) -> None:
    """Every tensor of every record must be in the files: a missing scale would be left uninitialized."""
    if files is None:
        return
    held: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            held.update(opened.keys())
    for name, record in records.items():
        for part in record.layout():
            if not any(f"{place}.{part}" in held for place in _names(name, prefix)):
                raise CompressError(f"The checkpoint lacks the tensor {name}.{part}.", _REWRITE)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, layer)


def register() -> None:
    """Make transformers know the method "lq"; calling it again changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(LQConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(LQQuantizer)
