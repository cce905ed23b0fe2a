from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from compress.adapters.attach import attach_lora, load_adapter, lora_delta, save_adapter
from compress.errors import CompressError, UsageError
from compress.model.architecture import architecture_of
from tests.tiny import DENSE, tiny_model
from tests.unit.adapters.common import randomise


def attached(kind: str = "llama_gqa", **options: Any) -> tuple[PeftModel, list[str]]:
    model = tiny_model(kind)
    arch = architecture_of(model.config.to_dict())
    names = [arch.module_name(layer, spec) for layer in range(arch.layers) for spec in arch.linears]
    return attach_lora(model, arch, **options), names


def adapted(model: PeftModel) -> list[str]:
    return [n for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")]


@pytest.mark.parametrize("kind", [*DENSE, "gpt2"])
def test_every_decoder_linear_and_nothing_else_is_adapted(kind: str) -> None:
    model, names = attached(kind, rank=4, alpha=12)
    assert sorted(adapted(model)) == sorted(names)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
    layer = model.get_base_model().get_submodule(names[0])
    assert layer.scaling["default"] == 3.0
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, tiny_model(kind)(input_ids=ids).logits)


def test_factors_are_float32_and_follow_from_the_seed_alone() -> None:
    def start(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        model = tiny_model("llama_gqa").bfloat16()
        peft_model = attach_lora(model, architecture_of(model.config.to_dict()), seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        return {n: p.detach() for n, p in peft_model.named_parameters() if p.requires_grad}

    first, second, other = start(1, 1), start(1, 2), start(2, 1)
    for name, factor in first.items():
        assert factor.dtype == torch.float32
        assert torch.equal(factor, second[name])
        if "lora_B" in name:
            assert not factor.any()
        else:
            assert not torch.equal(factor, other[name])
            bound = 1 / math.sqrt(factor.shape[1])
            assert float(factor.abs().max()) <= bound
            assert float(factor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert len({float(f.sum()) for n, f in first.items() if "lora_A" in n}) == len(first) // 2


@pytest.mark.parametrize(
    ("targets", "suffixes"),
    [
        (("q", "v"), {"q_proj", "v_proj"}),
        (("q_proj", "self_attn.q_proj", "mlp.up_proj"), {"q_proj", "up_proj"}),
        (("down", "lm_head"), {"down_proj", "lm_head"}),
    ],
)
def test_targets(targets: tuple[str, ...], suffixes: set[str]) -> None:
    model, _ = attached(targets=targets)
    found = adapted(model)
    assert {name.rpartition(".")[2] for name in found} == suffixes
    assert len(found) == sum(1 if s == "lm_head" else 2 for s in suffixes)


def test_wrong_requests_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="no adapter target query"):
        attached(targets=["query"])
    with pytest.raises(UsageError, match="no adapter target embed_tokens"):
        attached("llama_tied", targets=["lm_head", "embed_tokens"])
    with pytest.raises(UsageError, match="rank is 0"):
        attached(rank=0)


@pytest.mark.parametrize("kind", ["llama_gqa", "phi3", "gpt2"])
def test_delta_is_what_the_adapter_adds_to_the_linear(kind: str) -> None:
    model, names = attached(kind, rank=3, alpha=5)
    randomise(model)
    for name in names:
        layer = model.get_base_model().get_submodule(name)
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            added = layer(x) - layer.base_layer(x)
        delta = lora_delta(model, name)
        assert delta is not None
        assert delta.dtype == torch.float32
        torch.testing.assert_close(x @ delta.T, added, rtol=1e-3, atol=1e-4)


def test_linears_without_an_adapter_have_no_delta() -> None:
    model, _ = attached(targets=["q"])
    assert lora_delta(model, "model.layers.0.mlp.up_proj") is None


def test_a_saved_adapter_loads_in_stock_peft_and_names_no_path(tmp_path: Path) -> None:
    model, _ = attached(rank=4)
    model.get_base_model().name_or_path = str(tmp_path / "secret")
    randomise(model)
    save_adapter(model, tmp_path / "adapter", base_name="org/base")
    files = sorted(f.name for f in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for file in (tmp_path / "adapter").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "org/base"
    )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        stock = PeftModel.from_pretrained(tiny_model("llama_gqa"), str(tmp_path / "adapter")).eval()
        ours = load_adapter(tiny_model("llama_gqa"), tmp_path / "adapter")
        assert torch.equal(stock(input_ids=ids).logits, expected)
        assert torch.equal(ours(input_ids=ids).logits, expected)
    assert not any(p.requires_grad for p in ours.parameters())
    again = load_adapter(tiny_model("llama_gqa"), tmp_path / "adapter", trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora"
SPOILED = {
    "another prefix": (
        lambda t: {name.replace(".layers.", ".blocks."): x for name, x in t.items()},
        r"lacks 28 tensors, first '\S+\.layers\.0\.mlp\.down_proj\.lora_A\.weight', of the model and "
        r"has 28 tensors, first '\S+\.blocks\.0\.mlp\.down_proj\.lora_A\.weight', that",
    ),
    "no B": (lambda t: {n: x for n, x in t.items() if n != f"{Q}_B.weight"}, f"lacks '{Q}_B.weight' of the"),
    "one too many": (
        lambda t: t | {"base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": torch.ones(2, 2)},
        r"it has 'base_model\.model\.model\.layers\.9\.self_attn\.q_proj\.lora_B\.weight' that",
    ),
    "another shape": (lambda t: t | {f"{Q}_A.weight": torch.ones(4, 3)}, "size mismatch for .*q_proj"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_an_adapter_that_does_not_reach_the_model_is_refused(tmp_path: Path, name: str) -> None:
    model, _ = attached(rank=4)
    randomise(model)
    save_adapter(model, tmp_path / "adapter", base_name="org/base")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    spoil, cause = SPOILED[name]
    save_file(spoil(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(CompressError, match=cause) as refused:
        load_adapter(tiny_model("llama_gqa"), tmp_path / "adapter")
    assert refused.value.cause.startswith(f"The adapter {tmp_path / 'adapter'} does not fit the model: ")
    assert ".default." not in refused.value.cause


def test_an_adapter_of_modules_the_model_has_not_got_is_refused(tmp_path: Path) -> None:
    model, _ = attached()
    save_adapter(model, tmp_path / "adapter", base_name="org/base")
    with pytest.raises(CompressError, match="does not fit the model"):
        load_adapter(tiny_model("gpt2"), tmp_path / "adapter")
