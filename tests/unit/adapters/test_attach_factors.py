from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from compress.adapters.adapter_file import INITIAL_FILE, PREFIX, WEIGHTS_FILE, AdapterFile
from compress.adapters.attach import attach_factors, attach_lora, load_adapter, save_adapter
from compress.adapters.recover import recover_adapter
from compress.adapters.train import FitConfig, fit
from compress.data.windows import Windows
from compress.errors import CompressError, UsageError
from compress.model.architecture import Architecture, architecture_of
from compress.model.load import load_model
from compress.quantize.config import QuantConfig
from compress.quantize.decompose import decompose
from compress.quantize.linear import LQLinear
from tests.tiny import tiny_model
from tests.unit.adapters.common import make_pair, randomise

RANKS = {"q": 3, "k": 0, "v": 2, "o": 0, "gate": 5, "up": 0, "down": 2}
CONFIG = QuantConfig(bits=3, block_size=16, group_size=16)
IDS = torch.arange(3, 15)[None]


def quantised(model: Any, arch: Architecture) -> Any:
    """``model`` with LQ linears of the ranks above."""
    model = copy.deepcopy(model)
    for layer in range(arch.layers):
        for spec in arch.linears:
            name = arch.module_name(layer, spec)
            linear = model.get_submodule(name)
            parts = decompose(linear.weight.detach(), CONFIG, rank=RANKS[spec.role], iterations=2, seed=0)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LQLinear.from_decomposition(parts, linear.bias))
    return model.requires_grad_(False)


def tiny_lq(kind: str = "llama_gqa") -> tuple[Any, Architecture]:
    model = tiny_model(kind)
    arch = architecture_of(model.config.to_dict())
    return quantised(model, arch), arch


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("kind", ["llama_gqa", "qwen2"])
@pytest.mark.parametrize(("rank", "alpha"), [(8, 16), (4, 1)])
def test_attaching_changes_nothing_but_who_holds_the_factors(kind: str, rank: int, alpha: float) -> None:
    model, arch = tiny_lq(kind)
    before = logits(model)
    parts = {n: m.factors() for n, m in model.named_modules() if isinstance(m, LQLinear)}
    peft_model, initial = attach_factors(model, arch, rank=rank, alpha=alpha, seed=3)
    torch.testing.assert_close(logits(peft_model), before, rtol=1e-4, atol=1e-4)
    for name, factors in parts.items():
        layer = peft_model.get_base_model().get_submodule(name)
        scale = layer.scaling["default"]
        assert scale == pytest.approx(alpha / rank, rel=1e-12)
        factor_a, factor_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert factor_a.dtype == factor_b.dtype == torch.float32
        if factors is None:
            assert factor_a.shape[0] == rank
            assert not factor_b.any()
            assert factor_a.any()
            assert layer.base_layer.use_factors
            continue
        assert not layer.base_layer.use_factors
        torch.testing.assert_close(scale * factor_b @ factor_a, factors[0] @ factors[1], rtol=1e-5, atol=1e-6)
        assert torch.equal(initial[f"{PREFIX}{name}.lora_A.weight"], factor_a)
        assert torch.equal(initial[f"{PREFIX}{name}.lora_B.weight"], factor_b)
    assert len(initial) == 2 * sum(factors is not None for factors in parts.values())
    assert {n for n, p in peft_model.named_parameters() if p.requires_grad} == {
        n for n, _ in peft_model.named_parameters() if ".lora_" in n
    }


def test_training_moves_the_factors_and_keeps_the_codes(tmp_path: Path) -> None:
    model, arch = tiny_lq()
    peft_model, initial = attach_factors(model, arch, rank=4)
    codes = {n: p.clone() for n, p in peft_model.named_parameters() if p.dtype == torch.uint8}
    assert codes
    ids = torch.randint(0, 16, (8, 16), generator=torch.Generator().manual_seed(0))
    data = Windows(ids=ids, labels=ids, protocol={})
    result = fit(
        peft_model, data, FitConfig(steps=15, micro_batch=4, lr=5e-3, precision="float32"), validation=data
    )
    assert result.validation_before is not None
    assert result.validation_after is not None
    assert result.validation_after < result.validation_before - 0.2
    for name, parameter in peft_model.named_parameters():
        if parameter.dtype == torch.uint8:
            assert torch.equal(parameter, codes[name])
    save_adapter(peft_model, tmp_path / "adapter", base_name="lq", initial=initial)
    again = load_adapter(tiny_lq()[0], tmp_path / "adapter")
    assert torch.equal(logits(again), logits(peft_model))
    kept = load_file(tmp_path / "adapter" / INITIAL_FILE)
    assert kept.keys() == initial.keys()
    for name, start in initial.items():
        assert torch.equal(kept[name], start)
    trained = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert all(not torch.equal(trained[name], start) for name, start in initial.items())


def test_the_difference_is_recovered_not_the_factors(tmp_path: Path) -> None:
    """The chain's trap: full + recovered must not hold the small base's low-rank part a second time."""
    pair = make_pair("llama_gqa", tmp_path)
    small = load_model(pair.small, dtype=torch.float32)
    arch = architecture_of(small.config.to_dict())
    peft_model, initial = attach_factors(quantised(small, arch), arch, rank=4)
    save_adapter(peft_model, tmp_path / "untrained", base_name="lq", initial=initial)
    options: dict[str, Any] = {"full_name": "org/full"}
    args = (pair.structure, pair.arch, pair.full)
    report = recover_adapter(tmp_path / "untrained", *args, tmp_path / "nothing", **options)
    full = load_model(pair.full.path, dtype=torch.float32)
    before = logits(full)
    assert report.delta_norm == pytest.approx(0, abs=1e-5)
    assert report.differences == len(initial) // 2
    recovered = PeftModel.from_pretrained(full, str(tmp_path / "nothing"))
    torch.testing.assert_close(logits(recovered), before, rtol=1e-4, atol=1e-4)

    randomise(peft_model)
    save_adapter(peft_model, tmp_path / "trained", base_name="lq", initial=initial)
    report = recover_adapter(tmp_path / "trained", *args, tmp_path / "out", **options)
    with AdapterFile(tmp_path / "trained") as file:
        expected = 0.0
        for module in file.modules:
            factor_a, factor_b = file.factors(module)
            delta = factor_b.double() @ factor_a.double()
            start = file.initial_factors(module)
            delta -= 0 if start is None else start[1].double() @ start[0].double()
            expected += float((file.scaling(module).value * delta).square().sum())
    assert report.delta_norm == pytest.approx(expected**0.5, rel=1e-6)
    assert (
        logits(PeftModel.from_pretrained(load_model(pair.full.path), str(tmp_path / "out"))) - before
    ).abs().max() > 1e-2


def test_a_plain_lora_on_an_lq_model_keeps_its_factors() -> None:
    model, arch = tiny_lq()
    before = logits(model)
    peft_model = attach_lora(model, arch, rank=4)
    assert torch.equal(logits(peft_model), before)
    assert all(m.use_factors for m in peft_model.modules() if isinstance(m, LQLinear))


def test_only_lq_models_have_factors_to_attach() -> None:
    model = tiny_model("llama_gqa")
    arch = architecture_of(model.config.to_dict())
    with pytest.raises(CompressError, match="is not an LQ linear"):
        attach_factors(model, arch)
    lq, arch = tiny_lq()
    with pytest.raises(UsageError, match="rank is 0"):
        attach_factors(lq, arch, rank=0)
