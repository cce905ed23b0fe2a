"""A random model of LLaMA-2-7B's shape on the GPU: prune, quantize, one training step, recovery; seconds and memory.

``python -m compress.benchmarks.scale_gpu [--quick] [--menu standard] [--ranks] [--out FILE]``

Nothing is read or written but the record: the weights are drawn on the device, and every step calls the functions
that the commands call. Stages, in order: ``make``; ``lora step`` (the full model in bfloat16, adapters of rank 8 on
every linear, one window of 512 tokens, AdamW), whose gradients are LoRAPrune's; ``importance``; ``prune``,
to half of the decoder's weights; ``error table`` of the full model; ``allocation`` to 2.75 bits; ``decomposition`` of
each matrix as chosen; ``quantize small`` and ``qloram step`` (the pruned model in 4 bits); ``recover`` (its factors on
the full model's rows and columns, added to the weights). Peak memory is what torch's allocator held at most in a stage.

It needs a CUDA device of some 60 GB. ``--quick`` takes a tiny model, and a CPU too; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress.adapters.attach import attach_lora
from compress.adapters.factors import factor_product, scatter_rows
from compress.benchmarks.model_shapes import CONFIGS
from compress.benchmarks.protocol import Rows
from compress.importance.base import create_criterion
from compress.model.architecture import Architecture, LinearSpec, architecture_of, resized_config
from compress.model.config import build_config
from compress.prune.select import select
from compress.prune.slice import slice_weight
from compress.prune.uniform import choose_shape
from compress.quantize.blockwise import quantize_blockwise
from compress.quantize.config import QuantConfig
from compress.quantize.decompose import Decomposition, decompose
from compress.quantize.error_table import RANKS, Effort, ErrorTable, error_table, menu
from compress.quantize.linear import LQLinear
from compress.solvers.problem import Problem
from compress.solvers.solve import solve
from compress.structure import StructureMap, kept_columns, kept_rows, structure_map

TAKES = ("minutes", "seconds")
NEEDS = ("gpu",)

RATIO, BITS, RANK, WINDOW = 0.5, 2.75, 8, 512
TINY: dict[str, Any] = {
    **CONFIGS["LLaMA-2-7B"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@dataclass(slots=True, kw_only=True)
class Stages:
    """Seconds and peak memory of what ran under a name.

    Attributes:
        device: Whose memory.
        found: Name -> seconds, bytes held when it began, and at most within it (None on a CPU).
    """

    device: torch.device
    found: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure what happens inside."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device) if cuda else None
        began = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
        self.found[name] = {
            "seconds": time.perf_counter() - began,
            "bytes_before": before,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else None,
        }


def random_model(config: dict[str, Any], device: torch.device) -> tuple[Any, Architecture]:
    """A model of a config with transformers' own initial weights, in bfloat16 on the device."""
    built = build_config(config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(built, dtype=torch.bfloat16)
    return model, architecture_of(built.to_dict(), list(model.state_dict()))


def linears(model: nn.Module, arch: Architecture) -> Iterator[tuple[int, LinearSpec, nn.Module]]:
    """The decoder's linears, of a model that no adapter wraps, with their layer."""
    for layer in range(arch.layers):
        for spec in arch.linears_at(layer):
            yield layer, spec, model.get_submodule(arch.module_name(layer, spec))


def training_step(model: Any, arch: Architecture, device: torch.device, window: int) -> Any:
    """Adapters on every linear, and one step of AdamW on one random window; the adapters keep their gradients."""
    adapted: Any = attach_lora(model, arch, rank=RANK, dropout=0.0)
    adapted.train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(model.config.vocab_size, (1, window), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = adapted(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return adapted


def small_model(
    model: Any, config: dict[str, Any], arch: Architecture, structure: StructureMap
) -> tuple[Any, Architecture]:
    """The pruned model on the same device, from the full one's tensors."""
    shape = structure.shapes[0]
    small_config = resized_config(
        config, arch, heads=shape.kv_heads * shape.queries, kv_heads=shape.kv_heads, channels=shape.channels
    )
    built = build_config(small_config)
    with torch.device(model.device):
        small = AutoModelForCausalLM.from_config(built, dtype=torch.bfloat16)
    state = dict(model.state_dict())
    for layer, spec, module in linears(model, arch):
        kept = structure.layers[layer]
        state[f"{arch.module_name(layer, spec)}.weight"] = slice_weight(_weight(module), arch, spec, kept)
    small.load_state_dict(state)
    return small, architecture_of(built.to_dict(), list(small.state_dict()))


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def tables_of(
    model: nn.Module, arch: Architecture, effort: Effort, ranks: tuple[int, ...]
) -> dict[str, ErrorTable]:
    """The error table of every decoder linear, by tensor name."""
    configs = menu(effort)
    return {
        arch.tensor_name(layer, spec): error_table(_weight(module), configs, ranks, effort="quick")
        for layer, spec, module in linears(model, arch)
    }


def allocate(tables: dict[str, ErrorTable]) -> dict[str, tuple[QuantConfig, int]]:
    """The choice of configuration and rank for every matrix within :data:`BITS` stored bits a weight."""
    weights = sum(table.shape[0] * table.shape[1] for table in tables.values())
    problem = Problem(
        names=tuple(tables),
        costs=tuple(np.ascontiguousarray(table.errors.reshape(-1)) for table in tables.values()),
        sizes=tuple(np.ascontiguousarray(table.bits.reshape(-1)) for table in tables.values()),
        budget=int(BITS * weights),
    )
    chosen = solve(problem).choices
    return {name: table.choice(at) for (name, table), at in zip(tables.items(), chosen, strict=True)}


def in_four_bits(model: Any, arch: Architecture) -> None:
    """Replace every decoder linear by one of the same weights in NF4, without factors."""
    for layer, spec, module in linears(model, arch):
        quantized = quantize_blockwise(_weight(module), QuantConfig(bits=4, block_size=64))
        bare = {"factor_out": None, "factor_in": None, "rank": 0, "iterates": ()}
        layer_of = LQLinear.from_decomposition(
            Decomposition(quantized=quantized, error=0.0, weight_norm=0.0, **bare)  # type: ignore[arg-type]
        )
        model.set_submodule(arch.module_name(layer, spec), layer_of)


def recover(
    full: Any, arch: Architecture, adapted: Any, small_arch: Architecture, structure: StructureMap
) -> None:
    """Add the small model's adapters to the full one's weights, on the rows and columns that were kept."""
    base = adapted.get_base_model()
    for layer, spec, module in linears(full, arch):
        factors = base.get_submodule(small_arch.module_name(layer, spec))
        kept = structure.layers[layer]
        weight = _weight(module)
        b = scatter_rows(
            factors.lora_B["default"].weight.detach(),
            _there(kept_rows(arch, spec, kept), weight),
            weight.shape[0],
        )
        a = factors.lora_A["default"].weight.detach().T
        a = scatter_rows(a, _there(kept_columns(arch, spec, kept), weight), weight.shape[1]).T
        delta = factor_product(a, b, factors.scaling["default"])
        weight.copy_(delta.add_(weight))


def _there(index: Tensor | None, like: Tensor) -> Tensor | None:
    return None if index is None else index.long().to(like.device)


def scale(
    config: dict[str, Any], device: torch.device, *, effort: Effort, ranks: tuple[int, ...], window: int
) -> Stages:
    """Run every stage on one random model.

    Raises:
        CompressError: A stage refuses the model.
    """
    stages = Stages(device=device)
    with stages("make"):
        model, arch = random_model(config, device)
    with stages("lora step"):
        adapted = training_step(model, arch, device, window)
    criterion = create_criterion("lora", arch)
    with stages("importance"):
        criterion.observe(adapted)
        scores = criterion.scores()
    with stages("prune"):
        model = adapted.unload()
        del adapted
        model.zero_grad(set_to_none=True)
        plan = choose_shape(arch, RATIO, scores=scores)
        structure = structure_map(arch, select(arch, scores, plan.shapes), base_fingerprint="")
        small, small_arch = small_model(model, config, arch, structure)
    with torch.no_grad():
        with stages("error table"):
            tables = tables_of(model, arch, effort, ranks)
        with stages("allocation"):
            choices = allocate(tables)
        with stages("decomposition"):
            for layer, spec, module in linears(model, arch):
                chosen, rank = choices[arch.tensor_name(layer, spec)]
                decompose(_weight(module), chosen, rank=rank)
        with stages("quantize small"):
            in_four_bits(small, small_arch)
    host = model.to("cpu")  # LoRAM trains without the full model at hand
    with stages("qloram step"):
        adapted = training_step(small, small_arch, device, window)
    model = host.to(device)
    with stages("recover"), torch.no_grad():
        recover(model, arch, adapted, small_arch, structure)
    return stages


def report(found: dict[str, dict[str, float | None]]) -> str:
    """Seconds and peak gigabytes of every stage, and the two training steps against each other."""
    lines = []
    for name, row in found.items():
        peak = row["peak_bytes"]
        memory = "" if peak is None else f", at most {peak / 1e9:7.2f} GB"
        lines.append(f"{name:16} {row['seconds']:9.2f} s{memory}")
    lora, qloram = (found[name]["peak_bytes"] for name in ("lora step", "qloram step"))
    if lora and qloram:
        lines.append(f"qloram step: {qloram / lora:.0%} of the memory of the lora step on the full model")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Command line; the figures are printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.scale_gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, on a CPU too")
    parser.add_argument(
        "--menu", choices=("quick", "standard", "paper"), default="standard", help="of the error table"
    )
    parser.add_argument("--ranks", action="store_true", help="offer low-rank factors too, not rank 0 alone")
    parser.add_argument("--out", type=Path, help="write the record as JSON to this file")
    arguments = parser.parse_args(given)
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.quick:
        print(
            "This benchmark needs a CUDA device of some 60 GB; --quick takes a tiny model and a CPU.",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    stages = scale(
        TINY if arguments.quick else CONFIGS["LLaMA-2-7B"],
        device,
        effort=arguments.menu,
        ranks=RANKS if arguments.ranks else (0,),
        window=16 if arguments.quick else WINDOW,
    )
    if arguments.out is not None:
        identity = {
            "benchmark": "7B-shaped model on the GPU",
            "quick": arguments.quick,
            "menu": arguments.menu,
            "ranks": arguments.ranks,
            "device": torch.cuda.get_device_name(0) if cuda else "a CPU; its figures mean nothing",
        }
        rows = Rows(arguments.out, identity)
        for name, row in stages.found.items():
            rows.put(name, row)
    print(report(stages.found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
