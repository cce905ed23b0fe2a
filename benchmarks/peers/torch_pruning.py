"""torch-pruning's own pruner on a Hugging Face decoder, to a fraction of the decoder linear parameters.

``python -m compress.benchmarks.peers.torch_pruning --model DIR --ratio 0.5 --importance taylor --out DIR``

The pruner is driven through its public interface, as its documentation does it for language models: heads declared
with ``num_heads``, whole heads removed, head widths kept, every layer ranked by itself. Hidden size, embeddings and
output matrix stay. What it does with grouped queries limits the shapes: key/value heads are never removed, every KV
group loses the same number of query heads, and one query head per KV head is not reached (version 1.6 then leaves
the attention whole). The MLP makes up for what the heads cannot give.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch_pruning
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.adapters.loss import TokenLoss
from compress.benchmarks.protocol import calibration, write_json
from compress.data.sources import default_source
from compress.errors import CompressError, UsageError
from compress.model.architecture import Architecture, architecture_of
from compress.model.checkpoint import Checkpoint, copy_side_files
from compress.model.config import build_config
from compress.model.load import load_model, load_tokenizer, resolve
from compress.model.quiet import quiet_transformers

Importance = Literal["magnitude", "taylor"]

_ROLES = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
_TRACED_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What torch-pruning is asked to leave in every layer.

    Attributes:
        heads: Query heads.
        kv_heads: Key/value heads.
        channels: MLP channels.
        note: Why the heads do not carry the whole ratio; empty when they do.
    """

    heads: int
    kv_heads: int
    channels: int
    note: str = ""


def plan_shape(model: PreTrainedModel, arch: Architecture, ratio: float, *, heads: bool = True) -> Plan:
    """Heads as near to ``ratio`` as torch-pruning and the config allow, then the channels nearest to the rest.

    Args:
        model: Gives the config.
        arch: Its architecture.
        ratio: Fraction of the decoder linear parameters to remove.
        heads: False: the MLP carries all of it.

    Raises:
        UsageError: The ratio is not between 0 and 1, or the MLP cannot make up for the heads.
    """
    if not 0 < ratio < 1:
        raise UsageError(f"The ratio {ratio} is not between 0 and 1.", "Give a ratio such as 0.5.")
    grouped = arch.kv_heads < arch.heads
    step = arch.kv_heads if grouped else 1
    wanted = step * math.ceil(math.ceil(ratio * arch.heads) / step)  # torch-pruning's own rounding
    least = 2 * arch.kv_heads if grouped else 1
    counts = [arch.heads]
    if heads:
        smaller = range(arch.heads - step, least - 1, -step)
        counts += [count for count in smaller if _valid_heads(model, arch, count)]
    target = (1 - ratio) * arch.decoder_linear_parameters() / arch.layers
    for count in sorted(counts, key=lambda count: (abs(arch.heads - wanted - count), -count)):
        kv_heads = arch.kv_heads if grouped else count
        attention = 2 * arch.hidden * (count + kv_heads) * arch.head_dim
        channels = round((target - attention) / (3 * arch.hidden))
        if 1 <= channels < arch.channels:
            note = ""
            if heads and count != arch.heads - wanted:
                note = (
                    f"{arch.heads - count} of {arch.heads} query heads instead of {wanted} go, "
                    "which is what torch-pruning and the config allow; the MLP loses more instead"
                )
            return Plan(heads=count, kv_heads=kv_heads, channels=channels, note=note)
    raise UsageError(
        f"torch-pruning reaches no shape at the ratio {ratio} for this model.", "Give a more moderate ratio."
    )


def prune_with_torch_pruning(
    model: PreTrainedModel,
    ratio: float,
    *,
    importance: Importance,
    calibration_ids: torch.Tensor | None = None,
    heads: bool = True,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Prune ``model`` with torch-pruning; all layers keep the same numbers, which ones is its own choice.

    Args:
        model: A decoder with separate q, k, v, o, gate, up and down; it is used up.
        ratio: Fraction of the decoder linear parameters to remove.
        importance: Its group magnitude (L2), or its first-order group Taylor, both with its defaults.
        calibration_ids: Tokens [N, S] for the gradients of ``taylor``.
        heads: Remove query heads, too; False: MLP channels alone.

    Returns:
        The small model in eval mode, and facts as JSON values: version, settings, requested and achieved ratio, exact
        decoder linear parameters, what every layer keeps, and seconds.

    Raises:
        UsageError: The ratio cannot be reached, the importance has no such name, or Taylor has no text.
        CompressError: The architecture is not supported, or torch-pruning left another shape than was asked for.
    """
    started = time.perf_counter()
    if importance not in ("magnitude", "taylor"):
        raise UsageError(f"There is no importance {importance!r}.", "Choose magnitude or taylor.")
    config = model.config.to_dict()
    arch = architecture_of(config, list(model.state_dict()))
    if {spec.role for spec in arch.linears} != _ROLES:
        raise CompressError(
            f"The model type {arch.family!r} has fused or missing projections.",
            "Use a model with separate q, k, v, o, gate, up and down.",
        )
    plan = plan_shape(model, arch, ratio, heads=heads)
    tokens = 0
    if importance == "taylor":
        if calibration_ids is None or calibration_ids.numel() == 0:
            raise UsageError("Taylor importance needs calibration text.", "Give calibration_ids.")
        _gradients(model, arch, calibration_ids)
        tokens = calibration_ids.numel()
    _run(model, arch, plan, importance)
    small_config = {
        **config,
        arch.heads_key: plan.heads,
        arch.kv_heads_key: plan.kv_heads,
        arch.channels_key: plan.channels,
        "head_dim": arch.head_dim,
    }
    small = _rebuilt(model, small_config)
    before = arch.decoder_linear_parameters()
    kept = sum(
        small.get_parameter(arch.tensor_name(layer, spec)).numel()
        for layer in range(arch.layers)
        for spec in arch.linears
    )
    return small, {
        "peer": "torch-pruning",
        "version": version("torch-pruning"),
        "importance": importance,
        "calibration_tokens": tokens,
        "requested_ratio": ratio,
        "achieved_ratio": 1 - kept / before,
        "decoder_linear_parameters_before": before,
        "decoder_linear_parameters": kept,
        "heads": plan.heads,
        "kv_heads": plan.kv_heads,
        "channels": plan.channels,
        "note": plan.note,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _run(model: PreTrainedModel, arch: Architecture, plan: Plan, importance: Importance) -> None:
    """Cut ``model`` in place."""
    model.eval().requires_grad_(True)  # torch-pruning reads the graph of gradients
    # Its rule for grouped queries reads the repetition of keys and values, which only "eager" spells out.
    model.set_attn_implementation("eager")
    linears = {
        role: [
            model.get_submodule(arch.module_name(layer, spec))
            for layer in range(arch.layers)
            for spec in arch.linears
            if spec.role == role
        ]
        for role in _ROLES
    }
    ignored: list[nn.Module] = [model.get_output_embeddings(), *linears["o"], *linears["down"]]
    heads = dict.fromkeys(linears["q"], arch.heads)
    heads |= dict.fromkeys([*linears["k"], *linears["v"]], arch.kv_heads)
    if plan.heads == arch.heads:
        # Nothing to remove, and no need to follow the attention: with two query heads per KV head version 1.6
        # takes the rotary halves of k for a concatenation as wide as q, and does not come to an end.
        ignored += [module for role in "qkv" for module in linears[role]]
        heads = {}
    scores = torch_pruning.importance
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            model,
            {"input_ids": torch.ones(1, _TRACED_TOKENS, dtype=torch.long, device=model.device)},
            importance=(
                scores.GroupMagnitudeImportance()
                if importance == "magnitude"
                else scores.GroupTaylorImportance()
            ),
            global_pruning=False,
            # The half steps keep its rounding, down for channels and up for heads, on the numbers of the plan.
            pruning_ratio=1 - (plan.channels + 0.5) / arch.channels,
            head_pruning_ratio=max(0.0, (arch.heads - plan.heads - 0.5) / arch.heads),
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            in_channel_groups={},  # its defaults are shared between calls
            out_channel_groups={},
            ignored_layers=ignored,
            forward_fn=lambda network, inputs: network(**inputs, use_cache=False).logits,
        )
        pruner.step()
    model.zero_grad(set_to_none=True)


def _gradients(model: PreTrainedModel, arch: Architecture, ids_NS: torch.Tensor) -> None:
    """Gradients of the mean next-token loss over all windows, for the decoder linears."""
    model.eval().requires_grad_(False)
    for layer in range(arch.layers):
        for spec in arch.linears:
            model.get_parameter(arch.tensor_name(layer, spec)).requires_grad_(True)
    loss = TokenLoss(model)
    predicted = ids_NS.shape[0] * (ids_NS.shape[1] - 1)
    for ids_BS in ids_NS.to(model.device).split(1):
        (loss(ids_BS, ids_BS) / predicted).backward()


def _rebuilt(model: PreTrainedModel, config: dict[str, Any]) -> PreTrainedModel:
    """A fresh model of ``config`` with the weights that are left, which also proves their shapes."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        small: PreTrainedModel = AutoModelForCausalLM.from_config(build_config(config), dtype=model.dtype)
    try:
        small.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise CompressError(
            f"torch-pruning left other shapes than were asked for: {str(error).splitlines()[-1].strip()}",
            "Use another ratio, or another version of torch-pruning.",
        ) from error
    if model.generation_config is not None:
        small.generation_config = model.generation_config
    return small.to(model.device).eval()


def _valid_heads(model: PreTrainedModel, arch: Architecture, heads: int) -> bool:
    """Whether the config's own validator takes this number of query heads."""
    kv_heads = arch.kv_heads if arch.kv_heads < arch.heads else heads
    changes = {arch.heads_key: heads, arch.kv_heads_key: kv_heads, "head_dim": arch.head_dim}
    try:
        build_config(model.config.to_dict() | changes)
    except CompressError:
        return False
    return True


def main(given: list[str] | None = None) -> int:
    """Command line; the facts are printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.benchmarks.peers.torch_pruning", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", help="folder, hub id or GGUF file; the embedded model when not given")
    parser.add_argument(
        "--ratio", type=float, required=True, help="fraction of the decoder linears to remove"
    )
    parser.add_argument("--importance", choices=("magnitude", "taylor"), default="taylor")
    parser.add_argument("--keep-heads", action="store_true", help="remove MLP channels alone")
    parser.add_argument("--data", help="text source of the calibration; wikitext2 where it is at hand")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of the windows")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pruned model")
    arguments = parser.parse_args(given)
    try:
        facts = _write(arguments)
    except CompressError as error:
        print(f"{error.cause}\n{error.remedy}", file=sys.stderr)
        return error.exit_code
    print(
        f"torch-pruning {facts['version']}, {facts['importance']}: asked for {facts['requested_ratio']}, removed "
        f"{facts['achieved_ratio']:.4f}; {facts['heads']} query heads, {facts['kv_heads']} KV heads, "
        f"{facts['channels']} channels in {facts['seconds']} s."
    )
    if facts["note"]:
        print(facts["note"][0].upper() + facts["note"][1:] + ".")
    return 0


def _write(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune, and write a folder that transformers loads, with the facts in ``peer.json``."""
    if any(arguments.out.glob("*.safetensors")):
        raise CompressError(f"The folder {arguments.out} already holds weights.", "Choose an empty folder.")
    source = resolve(arguments.model)
    model = load_model(source, dtype=torch.float32)
    ids, text = None, {}
    if arguments.importance == "taylor":
        name = arguments.data or default_source()
        tokenizer = load_tokenizer(source)
        windows = calibration(tokenizer, name, arguments.tokens, arguments.seed, length=arguments.length)
        ids, text = windows.ids, windows.protocol
    small, facts = prune_with_torch_pruning(
        model,
        arguments.ratio,
        importance=arguments.importance,
        calibration_ids=ids,
        heads=not arguments.keep_heads,
    )
    checkpoint = Checkpoint(source)
    small.to(checkpoint.dtype(checkpoint.names[0]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        small.save_pretrained(arguments.out)
    copy_side_files(source, arguments.out)
    facts = {"format_version": 1, **facts, "calibration": text}
    write_json(arguments.out / "peer.json", facts)
    return facts


if __name__ == "__main__":
    sys.exit(main())
