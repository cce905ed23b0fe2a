"""AutoRound's signed gradient descent, for `environment_runner`; runs in auto-round's own environment."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(model: Path, settings: dict[str, Any]) -> Any:
    """The dense model and its tokenizer."""
    import_module("auto_round")
    network = AutoModelForCausalLM.from_pretrained(str(model), dtype="auto", local_files_only=True)
    return network, AutoTokenizer.from_pretrained(str(model), local_files_only=True)


def quantize(loaded: Any, ids_NS: torch.Tensor, linears: list[str], settings: dict[str, Any]) -> Any:
    """AutoRound with its defaults, but no compilation and as many iterations as asked for."""
    network, tokenizer = loaded
    tuner = import_module("auto_round").AutoRound(
        network,
        tokenizer,
        bits=settings["bits"],
        group_size=settings["group_size"],
        sym=True,
        iters=settings["iterations"],
        dataset=list(ids_NS.split(1)),
        nsamples=ids_NS.shape[0],
        seqlen=ids_NS.shape[1],
        batch_size=min(8, ids_NS.shape[0]),
        device_map="cpu",
        enable_torch_compile=False,
    )
    tuner.quantize()
    return tuner


def save(quantized: Any, folder: Path) -> None:
    """The checkpoint in auto-round's own format."""
    quantized.save_quantized(str(folder), format="auto_round")


def reopen(folder: Path, model: Path, linears: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Its plain torch modules: what transformers would choose on a CPU needs one more package."""
    packing = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]["packing_format"]
    # Two conventions: zeros stored as they are, or, as in GPTQ's files, one less.
    kind = "qlinear_torch_zp" if packing.endswith("gptq") else "qlinear_torch"
    built = import_module(f"auto_round_extension.torch.{kind}").QuantLinear
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    modules = {}
    for name in linears:
        prefix = f"{name}."
        own = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        rows, columns = own["qweight"].shape[0] * 32 // settings["bits"], own["qweight"].shape[1]
        modules[name] = built(
            settings["bits"], settings["group_size"], rows, columns, "bias" in own, g_idx="g_idx" in own
        )
        modules[name].load_state_dict(own)
    return modules


@torch.no_grad()
def weight(module: Any) -> torch.Tensor:
    """What the module makes of the identity, less the bias; the scales widened, so that nothing is rounded."""
    scales, bias = module.scales, module.bias
    module.scales, module.bias = scales.float(), None
    weight_OI: torch.Tensor = module(torch.eye(module.infeatures)).T
    module.scales, module.bias = scales, bias
    return weight_OI


def dtype(module: Any) -> torch.dtype:
    """What the module computes in."""
    kind: torch.dtype = module.scales.dtype
    return kind
