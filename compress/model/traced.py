"""Decoders of undeclared families: what can be cut, proved by shapes and torch-pruning's dependency graph."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch_pruning
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from compress.errors import CompressError
from compress.model.config import meta_model, shallow_config
from compress.model.family import Role
from compress.model.layout import Architecture, LinearSpec, Shapes
from compress.model.quiet import quiet_transformers

_USUAL_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "d_inner", "inner_dim")
_TRACED_CHANNELS = 16
_TRACED_TOKENS = 8
_TRACED_VOCAB = 16
_CHANNELS = (1, 5)  # the two channels followed through the graph


def trace_architecture(config: Any) -> Architecture:
    """The architecture of a dense decoder that no family file declares.

    The MLP width is the one config entry whose change resizes exactly one set of linears (tried on models
    without weights). Then torch-pruning's dependency graph of a one-layer copy must show that channel c of
    the up (and gate) projection meets column c of the down projection and nothing else. Rows of the
    attention projections are not proven to belong to heads, so attention is neither pruned nor listed.

    Args:
        config: A transformers config object.

    Raises:
        CompressError: No such MLP exists, or the layers are not alike; the sentence names what is missing.
    """
    with quiet_transformers():
        return _trace(config)


def _trace(config: Any) -> Architecture:
    kind = str(config.model_type)
    model = meta_model(config)
    prefix, layers = _decoder_layers(model, config)
    _refuse_shared(kind, model, prefix)
    _refuse_unlike_layers(kind, model, prefix, layers)
    key, names = _channel_key(config, prefix)
    linears = {name: model.get_submodule(f"{prefix}.0.{name}") for name in names}
    shapes = {name: _out_in(module) for name, module in linears.items()}
    hidden = int(config.hidden_size)
    producers = [name for name, (_, into) in shapes.items() if into == hidden]
    consumers = [name for name, (out, _) in shapes.items() if out == hidden]
    channels = {shapes[name][0] for name in producers} | {shapes[name][1] for name in consumers}
    if len(consumers) != 1 or len(producers) not in (1, 2) or len(channels) != 1 or producers == consumers:
        raise _no_mlp(kind)
    roles = _prove_channels(_traceable(config, key), kind, prefix, producers, consumers[0])
    heads = int(config.num_attention_heads)
    attention = sorted(
        name
        for name, module in model.get_submodule(f"{prefix}.0").named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name not in names
    )
    return Architecture(
        family=kind,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        channels=channels.pop(),
        vocab=int(config.vocab_size),
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        linears=tuple(
            LinearSpec(
                name=name,
                role=roles[name],
                bias=module.bias is not None,
                transposed=isinstance(module, Conv1D),
            )
            for name, module in linears.items()
        ),
        layer_prefix=f"{prefix}.{{layer}}.",
        embedding=_module_name(model, model.get_input_embeddings()) + ".weight",
        lm_head=_module_name(model, model.get_output_embeddings()) + ".weight",
        prunable_heads=False,
        heads_reason=(
            f"no rule says which rows of {', '.join(attention)} make up a head in model type {kind!r}"
        ),
        channels_key=key,
    )


def _decoder_layers(model: nn.Module, config: Any) -> tuple[str, int]:
    total = int(getattr(config, "num_hidden_layers", 0) or 0)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if total == 0 or not found:
        raise CompressError(
            f"The model type {config.model_type!r} has no list of decoder layers that its config counts.",
            "Use a model of a declared family, or a plain decoder.",
        )
    return found[0], total


def _refuse_unlike_layers(kind: str, model: nn.Module, prefix: str, layers: int) -> None:
    first, *others = (_shapes(model.get_submodule(f"{prefix}.{layer}")) for layer in range(layers))
    if any(other != first for other in others):
        raise CompressError(
            f"The decoder layers of model type {kind!r} differ, and a rule for them is missing.",
            "Use a model whose layers are all alike.",
        )


def _refuse_shared(kind: str, model: nn.Module, prefix: str) -> None:
    """Refuse decoder weights that two modules share: what is cut for one would be cut for the other."""
    seen: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(parameter, name)
        if first != name and name.startswith(f"{prefix}."):
            raise CompressError(
                f"In model type {kind!r} {first} and {name} share one tensor, so none of them can be changed alone.",
                "Use a model whose layers have weights of their own.",
            )


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _channel_key(config: Any, prefix: str) -> tuple[str, tuple[str, ...]]:
    """The config entry of the MLP width, and the linears of a layer that it resizes (each by one axis)."""
    base = shallow_config(config, 1)
    before = meta_model(base)
    entries = vars(base)
    layer_sizes = {size for shape in _shapes(before).values() for size in shape}
    usual = [key for key in _USUAL_KEYS if key in entries]
    others = [
        k for k, v in entries.items() if type(v) is int and v > 1 and v in layer_sizes and k not in usual
    ]
    for key in (*usual, *others):
        names = _resized_linears(base, before, f"{prefix}.0.", key)
        if names:
            return key, names
    raise _no_mlp(str(config.model_type))


def _resized_linears(base: Any, before: nn.Module, prefix: str, key: str) -> tuple[str, ...]:
    """Linears whose weight follows entry ``key``; none when anything else follows it, or building fails."""
    trial = copy.deepcopy(base)
    width = max(8, (getattr(base, key) or 4 * int(base.hidden_size)) // 2)
    try:
        setattr(trial, key, width)
        after = _shapes(meta_model(trial))
    except (CompressError, ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError):
        return ()  # a trial: this entry cannot be halved on its own, so it is not the MLP width
    changed = [name for name, shape in _shapes(before).items() if after.get(name) != shape]
    modules: dict[str, None] = {}
    for name in changed:
        owner, _, kind = name.rpartition(".")
        module = before.get_submodule(owner)
        old, new = tuple(before.get_parameter(name).shape), after.get(name, ())
        moved = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
        if not (
            name.startswith(prefix) and isinstance(module, (nn.Linear, Conv1D)) and kind in ("weight", "bias")
        ):
            return ()
        if len(old) != len(new) or len(moved) != 1 or moved[0][1] != width:
            return ()
        modules[owner.removeprefix(prefix)] = None
    return tuple(modules)


def _prove_channels(
    model: nn.Module, kind: str, prefix: str, producers: list[str], consumer: str
) -> dict[str, Role]:
    """Roles of the MLP's linears, shown by the dependency graph of a small copy.

    Raises:
        CompressError: The graph shows another coupling, or not which of two producers is the gate.
    """
    ids = torch.zeros(1, _TRACED_TOKENS, dtype=torch.long)
    graph = torch_pruning.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of norms and embeddings, which stay as they are
        try:
            graph.build_dependency(
                model,
                example_inputs={"input_ids": ids},
                forward_fn=lambda m, x: m(**x, use_cache=False).logits,
            )
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise CompressError(
                f"A copy of the model type {kind!r} cannot be run to trace it: {str(error).splitlines()[0]}.",
                "Check config.json, or use a model of a declared family.",
            ) from error
    _refuse_bidirectional(model, kind)
    modules = {name: model.get_submodule(f"{prefix}.0.{name}") for name in (*producers, consumer)}
    for name in producers:
        group = graph.get_pruning_group(
            modules[name], torch_pruning.prune_linear_out_channels, list(_CHANNELS)
        )
        touched = {}
        for dependency, channels in group:
            target = dependency.target.module
            if any(True for _ in target.parameters()):
                output = graph.is_out_channel_pruning_fn(dependency.handler)
                touched[(id(target), output)] = tuple(channels)
        expected = {(id(modules[p]), True): _CHANNELS for p in producers}
        if touched != expected | {(id(modules[consumer]), False): _CHANNELS}:
            raise _no_mlp(kind)
    roles: dict[str, Role] = {consumer: "down", producers[0]: "up"}
    if len(producers) == 2:
        # The up projection enters the product itself; the gate passes an activation first.
        joined = {
            name: any(len(node.inputs) > 1 for node in graph.module2node[modules[name]].outputs)
            for name in producers
        }
        if sorted(joined.values()) != [False, True]:
            pair = " and ".join(producers)
            raise CompressError(
                f"The graph of model type {kind!r} does not show which of {pair} is the gate.",
                "Use a model of a declared family.",
            )
        for name, direct in joined.items():
            roles[name] = "up" if direct else "gate"
    return roles


def _traceable(config: Any, key: str) -> nn.Module:
    """One layer, few channels and a tiny vocabulary on the CPU, its Conv1D layers as plain linears."""
    small = shallow_config(config, 1)
    setattr(small, key, _TRACED_CHANNELS)
    small.vocab_size = _TRACED_VOCAB
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, key, 0)
    vars(small).pop("quantization_config", None)
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = AutoModelForCausalLM.from_config(
            small, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for name, module in list(model.named_modules()):
            if isinstance(module, Conv1D):
                out, into = _out_in(module)
                model.set_submodule(name, nn.Linear(into, out))
    return model


def _refuse_bidirectional(model: Any, kind: str) -> None:
    ids = torch.zeros(2, _TRACED_TOKENS, dtype=torch.long)
    ids[1, -1] = 1
    with torch.no_grad():
        first, second = model(input_ids=ids, use_cache=False).logits[:, :-1]
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-6):
        raise CompressError(
            f"The model type {kind!r} looks at later tokens, and only decoders are supported.",
            "Use a decoder-only model.",
        )


def _out_in(module: Any) -> tuple[int, int]:
    first, second = module.weight.shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def _module_name(model: nn.Module, wanted: nn.Module) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _no_mlp(kind: str) -> CompressError:
    return CompressError(
        f"In model type {kind!r} no config entry and no pair of linears can be proven to be the MLP's width.",
        "Use a model of a declared family, or a plain decoder with a two- or three-linear MLP.",
    )
