"""Layers that run again in the backward pass: the same numbers, less held, nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from compress.adapters.align import release_weights
from compress.adapters.attach import attach_factors, attach_lora, attach_pissa
from compress.adapters.distill import Distillation
from compress.adapters.masked import mask_adapters
from compress.adapters.train import FitResult, fit
from compress.benchmarks.importance import LiveTensors
from compress.errors import UsageError
from compress.importance.base import create_criterion
from compress.importance.collect import collect
from compress.model.int8 import to_int8
from compress.model.load import load_model
from compress.model.recompute import can_recompute, recomputing, require_recompute
from compress.model.streamed import stream_model
from compress.pipelines.measure import summed_loss
from compress.prune.controller import PruneController
from compress.prune.schedule import PruningSchedule
from compress.prune.uniform import choose_shape
from tests.tiny import DENSE, TINY, tiny_checkpoint, tiny_model
from tests.unit.adapters.test_attach_factors import tiny_lq
from tests.unit.adapters.test_masked import random_masks
from tests.unit.adapters.test_train import CONFIG, Stop, assert_same, stopping_at, trained, windows
from tests.unit.prune.common import model_architecture
from tests.unit.uneven import make_uneven

SHORT = replace(CONFIG, steps=3)


def lora(model: Any, dropout: float = 0.2) -> Any:
    return attach_lora(model, model_architecture(model), rank=3, alpha=6, dropout=dropout, seed=1)


def passes(model: nn.Module) -> list[str]:
    """Where every forward pass of an MLP of the first layer is written from now on."""
    seen: list[str] = []
    branches = ("mlp", "fc2")
    name = next(n for n, _ in model.named_modules() if n.split(".")[-1] in branches and ".0." in f"{n}.")
    model.get_submodule(name).register_forward_pre_hook(lambda *_: seen.append(name))
    return seen


def both(build: Callable[[], Any], **given: Any) -> None:
    """Train what ``build`` makes without and with recomputation, and compare every bit."""
    found: list[tuple[FitResult, dict[str, Tensor]]] = []
    counts = []
    for recompute in (False, True):
        model = build()
        seen = passes(model)
        result = fit(model, windows(), replace(given.get("config", SHORT), recompute=recompute))
        counts.append(len(seen))
        found.append((result, trained(model)))
    (plain, parameters), (again, others) = found
    assert again.losses == plain.losses
    assert_same(others, parameters)
    backward = SHORT.steps * SHORT.accumulation
    assert counts[1] == counts[0] + backward  # the layer did run again, once a backward pass


@pytest.mark.parametrize("kind", [*DENSE, "gpt2"])
def test_training_is_the_same_with_dropout(kind: str) -> None:
    """GPT-2 has dropout of its own too, in attention as well."""
    both(lambda: lora(tiny_model(kind)))


def quantized() -> Any:
    model, arch = tiny_lq()
    return attach_lora(model, arch, rank=3, dropout=0.2, seed=1)


def factors() -> Any:
    model, arch = tiny_lq()
    return attach_factors(model, arch, rank=3, seed=1)[0]


def pissa() -> Any:
    model = tiny_model("llama_gqa")
    return attach_pissa(model, model_architecture(model), rank=3)[0]


def thinned() -> Any:
    model = tiny_model("llama_gqa")
    masks = random_masks(model, model_architecture(model))
    adapted = lora(model)
    mask_adapters(adapted, masks)
    return adapted


def eight_bit() -> Any:
    model = tiny_model("llama_gqa")
    to_int8(model, model_architecture(model))
    return attach_lora(model, model_architecture(tiny_model("llama_gqa")), rank=3, dropout=0.2, seed=1)


def whole() -> Any:
    model = tiny_model("llama_gqa")
    release_weights(model)
    return model


def with_head() -> Any:
    model = tiny_model("llama_gqa")
    arch = model_architecture(model)
    return attach_lora(model, arch, rank=3, targets=("all", "lm_head"), dropout=0.2, seed=1)


BUILDERS = (quantized, factors, pissa, thinned, eight_bit, whole, with_head)


@pytest.mark.parametrize("build", BUILDERS, ids=[build.__name__ for build in BUILDERS])
def test_whatever_is_trained_is_the_same(build: Callable[[], Any]) -> None:
    both(build)


@pytest.mark.parametrize("kind", ["llama_gqa", "gpt2"])
def test_layers_of_different_sizes_are_the_same(kind: str, tmp_path: Path) -> None:
    made = make_uneven(kind, tmp_path)
    both(lambda: attach_lora(load_model(made.small.path), made.small_arch, rank=3, dropout=0.2, seed=1))


@pytest.mark.parametrize(
    "build", [lambda: lora(tiny_model("llama_gqa").bfloat16()), quantized, with_head, whole]
)
def test_bfloat16_runs_again_as_it_ran(build: Callable[[], Any]) -> None:
    """Layers that PEFT would cast, or autocast would not, save other tensors the second time, which torch refuses."""
    both(build, config=replace(SHORT, precision="bfloat16"))


def test_galore_is_the_same() -> None:
    pytest.importorskip("galore_torch")
    both(whole, config=replace(SHORT, optimizer="galore", weight_decay=0.0))


@pytest.mark.parametrize("feature_weight", [0.0, 0.3])
def test_distillation_is_the_same_and_leaves_the_teacher_alone(feature_weight: float) -> None:
    found = []
    for recompute in (False, True):
        student, teacher = whole(), tiny_model("llama_gqa", seed=4)
        seen = passes(teacher)
        towards = Distillation(teacher=teacher, text_share=0.5, feature_weight=feature_weight)
        result = fit(student, windows(), replace(SHORT, recompute=recompute), distillation=towards)
        found.append((result.losses, trained(student), len(seen)))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])
    assert found[0][2] == found[1][2] > 0


@pytest.mark.parametrize("one_shot", [False, True])
def test_scores_and_masks_that_close_in_training_are_the_same(one_shot: bool) -> None:
    found = []
    for recompute in (False, True):
        plain = tiny_model("llama_gqa")
        arch = model_architecture(plain)
        model = attach_lora(plain, arch, rank=2, dropout=0.1, seed=4)
        controller = PruneController(
            model,
            arch,
            create_criterion("lora", arch),
            PruningSchedule(total_steps=6, every=1),
            lambda scores, arch=arch: choose_shape(arch, 0.5, multiple=8, scores=scores),
            one_shot=one_shot,
        )
        with controller:
            fit(model, windows(), replace(CONFIG, recompute=recompute), hooks=[controller])
            found.append((controller.state_dict(), controller.structure(base_fingerprint="")))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert not found[0][1].is_identity


@pytest.mark.parametrize("first", [False, True])
def test_an_interrupted_run_goes_on_with_the_other_way(first: bool, tmp_path: Path) -> None:
    """One that died for want of memory has to be able to; the file of its state is one of before the option, too."""
    expected = lora(tiny_model("llama_gqa"))
    result = fit(expected, windows(), CONFIG)
    broken = lora(tiny_model("llama_gqa"))
    stop = stopping_at(broken, 12)
    with pytest.raises(Stop):
        fit(broken, windows(), replace(CONFIG, recompute=first), state_dir=tmp_path)
    stop.remove()
    again = lora(tiny_model("llama_gqa"))
    resumed = fit(again, windows(), replace(CONFIG, recompute=not first), state_dir=tmp_path)
    assert resumed.losses == result.losses
    assert_same(trained(again), trained(expected))
    assert "recompute" not in CONFIG.identity
    assert CONFIG.identity["seed"] == CONFIG.seed


KINDS = ["llama_gqa", "phi3", "gemma2", "gpt2"]


def text() -> Tensor:
    return torch.randint(0, 128, (6, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", ["taylor", "obs"])
def test_scores_by_gradients_are_the_same_without_dropout(kind: str, criterion: str) -> None:
    """GPT-2 would drop a tenth out if its layers were in training mode altogether."""
    model = tiny_model(kind)
    arch = model_architecture(model)
    found, counts = [], []
    seen = passes(model)
    for recompute in (False, True):
        scored = create_criterion(criterion, arch)
        seen.clear()
        collect(scored, model, arch, text(), loss=summed_loss(model), batch=2, recompute=recompute)
        found.append(scored.scores().to_tensors())
        counts.append(len(seen))
    assert_same(found[0], found[1])
    batches = 3  # obs sends half of the windows through the backward pass, half as many at once
    probes = 2
    assert counts[1] == counts[0] + batches + probes
    assert not any(module.training for module in model.modules())


def test_a_model_that_is_streamed_runs_again_anyway(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama_gqa", tmp_path / "m")
    found = []
    for recompute in (False, True):
        model = stream_model(path, dtype=torch.float32)
        arch = model_architecture(tiny_model("llama_gqa"))
        criterion = create_criterion("obs", arch)
        seen = passes(model)
        collect(criterion, model, arch, text(), loss=summed_loss(model), batch=2, recompute=recompute)
        found.append((criterion.scores().to_tensors(), len(seen)))
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def held(recompute: bool, build: Callable[[], Any], run: Callable[[Any, bool], Any]) -> int:
    """Peak bytes of tensors that are made while ``run`` works on a model."""
    model = build()
    account = LiveTensors()
    account.ignore(model)
    with account:
        run(model, recompute)
    return account.peak


def deep() -> Any:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train_once(model: Any, recompute: bool) -> None:
    data = windows(count=4, length=64)
    fit(
        model,
        data,
        replace(CONFIG, steps=1, warmup_steps=0, micro_batch=4, accumulation=1, recompute=recompute),
    )


def score_once(criterion: str) -> Callable[[Any, bool], None]:
    def run(model: Any, recompute: bool) -> None:
        arch = model_architecture(model)
        ids = torch.randint(0, 128, (4, 64), generator=torch.Generator().manual_seed(3))
        collect(
            create_criterion(criterion, arch),
            model,
            arch,
            ids,
            loss=summed_loss(model),
            batch=4,
            recompute=recompute,
        )

    return run


@pytest.mark.parametrize(
    ("build", "run", "share"),
    [
        (lambda: lora(deep()), train_once, 0.25),
        (lambda: lora(deep(), dropout=0.0), train_once, 0.35),
        (deep, score_once("taylor"), 0.6),  # with a gradient of every weight
        (deep, score_once("obs"), 0.6),  # two windows at once, and second moments
    ],
    ids=["lora, dropout", "lora", "taylor", "obs"],
)
def test_far_less_is_held(build: Callable[[], Any], run: Callable[[Any, bool], Any], share: float) -> None:
    assert held(True, build, run) < share * held(False, build, run)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    model = lora(tiny_model("llama_gqa"))
    network: Any = model.get_base_model()
    network.eval()
    config = copy.deepcopy(network.config.to_dict())
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in network.named_modules()}
    try:
        with recomputing(model):
            assert network.is_activation_checkpointing
            assert [m.training for m in network.model.layers] == [True, True]
            assert not any(m.training for layer in network.model.layers for m in list(layer.modules())[1:])
            if fails:
                raise KeyError("x")
    except KeyError:
        assert fails
    assert not network.is_activation_checkpointing
    assert not any(module.training for module in network.modules())
    assert network.config.to_dict() == config
    assert hooks == {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in network.named_modules()}


def test_an_architecture_that_cannot_is_refused() -> None:
    """GPT-1 is one in transformers."""
    config = OpenAIGPTConfig(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    with pytest.raises(
        UsageError, match="OpenAIGPTLMHeadModel of transformers does not support gradient"
    ) as told:
        require_recompute(config.to_dict())
    assert "Leave out --recompute" in told.value.remedy
    with pytest.raises(UsageError, match="does not support"), recomputing(OpenAIGPTLMHeadModel(config)):
        raise AssertionError("it was let in")
    assert not can_recompute(config.to_dict())
    model = OpenAIGPTLMHeadModel(config).eval()
    with recomputing(model, required=False):  # where it is a saving and nobody asked for it
        assert not any(module.training for module in model.modules())
    for kind in (*DENSE, "gpt2"):
        require_recompute(TINY[kind]().to_dict())


def test_layers_that_drop_out_by_themselves_are_not_scored_so() -> None:
    """OPT's layers look at their own flag; without dropout they are scored as ever."""

    def opt(dropout: float) -> Any:
        config = OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=48,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            dropout=dropout,
        )
        return OPTForCausalLM(config).eval()

    model = opt(0.1)
    with pytest.raises(UsageError, match="drop activations out"), recomputing(model):
        raise AssertionError("it was let in")
    assert not any(module.training for module in model.modules())
    assert not model.is_activation_checkpointing
    with recomputing(model, required=False):
        assert not any(module.training for module in model.modules())
        assert not model.is_activation_checkpointing
    model, found = opt(0.0), []
    arch = model_architecture(model)
    ids = text() % 64
    for recompute in (False, True):
        criterion = create_criterion("taylor", arch)
        collect(criterion, model, arch, ids, loss=summed_loss(model), batch=2, recompute=recompute)
        found.append(criterion.scores().to_tensors())
    assert_same(found[0], found[1])
