"""LQ checkpoints through from_pretrained, save_pretrained and PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, PreTrainedModel

from compress.errors import CompressError
from compress.quantize.hf import LQConfig, register
from compress.quantize.linear import LQLinear
from tests.unit.quantize.conftest import Pair, load, quiet, write_pair

IDS = torch.randint(4, 128, (2, 19), generator=torch.Generator().manual_seed(0))


def lq_layers(model: nn.Module) -> dict[str, LQLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LQLinear)}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    out: torch.Tensor = model(IDS).logits
    return out.float()


def test_the_model_equals_its_dense_twin(pair: Pair) -> None:
    model = load(pair.quantized)
    torch.testing.assert_close(logits(model), logits(load(pair.dense)), rtol=1e-4, atol=1e-4)
    assert len(lq_layers(model)) == 13  # of 14: one stays dense
    assert sum(type(m) is nn.Linear for m in model.model.modules()) == 1


def test_every_tensor_is_loaded_bit_for_bit(pair: Pair) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load(pair.quantized, dtype)
        state = model.state_dict()
        for name, layer in lq_layers(model).items():
            for part in layer.record.layout():
                assert torch.equal(state[f"{name}.{part}"], pair.tensors[f"{name}.{part}"])
                assert state[f"{name}.{part}"].dtype == pair.tensors[f"{name}.{part}"].dtype
        assert model.dtype == dtype
        assert not any(layer.weight.requires_grad for layer in lq_layers(model).values())


def test_half_precision_keeps_the_weights(pair: Pair) -> None:
    expected = {n: m.dequantized_weight() for n, m in lq_layers(load(pair.quantized)).items()}
    bfloat, cast = load(pair.quantized, torch.bfloat16), load(pair.quantized).to(torch.float16)
    for model in (bfloat, cast):
        for name, layer in lq_layers(model).items():
            assert torch.equal(layer.dequantized_weight(), expected[name])
    ours, dense = logits(bfloat), logits(load(pair.dense, torch.bfloat16))
    assert (ours - dense).norm() < 0.02 * dense.norm()  # processors round single logits in their own ways
    cast.model.half()  # transformers itself refuses half() on the outermost quantized model
    for name, layer in lq_layers(cast).items():
        assert torch.equal(layer.dequantized_weight(), expected[name])


def test_saving_and_loading_again_changes_no_bit(pair: Pair, tmp_path: Path) -> None:
    model = load(pair.quantized)
    with quiet():
        model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == pair.tensors.keys()
    assert all(torch.equal(saved[name], pair.tensors[name]) for name in saved)
    original, copied = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (pair.quantized, tmp_path)
    )
    assert copied == original
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_sharded_saves_load(pair: Pair, tmp_path: Path) -> None:
    model = load(pair.quantized)
    with quiet():
        model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_the_base_model_loads_alone(pair: Pair) -> None:
    with quiet():
        base = AutoModel.from_pretrained(pair.quantized)
    whole = load(pair.quantized)
    assert len(lq_layers(base)) == 13
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_dequantize_gives_plain_linears(pair: Pair) -> None:
    model = load(pair.quantized)
    expected = logits(model)
    plain = model.dequantize()
    assert lq_layers(plain) == {}
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama_tied", "phi3", "gpt2"])
def test_other_layouts_load_too(kind: str, tmp_path: Path) -> None:
    """Tied embeddings, fused projections, and GPT-2's transposed Conv1D."""
    other = write_pair(kind, tmp_path)
    model = load(other.quantized)
    assert lq_layers(model)
    torch.testing.assert_close(logits(model), logits(load(other.dense)), rtol=1e-4, atol=1e-4)


def with_lora(base: PreTrainedModel) -> PeftModel:
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj", "gate_proj"], lora_dropout=0.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PeftModel = get_peft_model(base, lora)
    return model


def adapted(path: Path) -> PeftModel:
    model = with_lora(load(path))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def test_lora_gradients_equal_those_on_dense_weights(pair: Pair) -> None:
    gradients = []
    for path in (pair.quantized, pair.dense):
        model = adapted(path)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    found, expected = gradients
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 3 * 2
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)
        assert found[name].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_saves_and_loads(pair: Pair, dtype: torch.dtype, tmp_path: Path) -> None:
    base = load(pair.quantized, dtype)
    codes = {name: layer.weight.clone() for name, layer in lq_layers(base).items()}
    model = with_lora(base)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, layer in lq_layers(model.base_model.model).items():
        assert torch.equal(layer.quantized().codes, codes[name.replace(".base_layer", "")])
    model.eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(pair.quantized, dtype), tmp_path)
    assert torch.equal(logits(again), logits(model))


def broken(pair: Pair, folder: Path, drop: str = "", **config: object) -> Path:
    """A copy of the checkpoint with a tensor dropped or its quantization_config changed."""
    path = Path(shutil.copytree(pair.quantized, folder / "broken"))
    if drop:
        save_file({n: t for n, t in pair.tensors.items() if n != drop}, path / "model.safetensors")
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"] |= config
    (path / "config.json").write_text(json.dumps(values))
    return path


def test_a_missing_scale_is_refused(pair: Pair, tmp_path: Path) -> None:
    name = next(name for name in pair.tensors if name.endswith("weight_scale_max"))
    with pytest.raises(CompressError, match=f"lacks the tensor {name}"):
        load(broken(pair, tmp_path, drop=name))


def test_another_format_version_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="version 2"):
        load(broken(pair, tmp_path, format_version=2))


def test_a_matrix_the_model_lacks_is_refused(pair: Pair, tmp_path: Path) -> None:
    matrices = json.loads((pair.quantized / "config.json").read_text())["quantization_config"]["matrices"]
    record = next(iter(matrices.values()))
    extra = {f"model.wat.{part}": t for part, t in ((p, torch.zeros(1)) for p in _layout(record))}
    path = broken(pair, tmp_path, matrices={**matrices, "model.wat": record})
    save_file({**pair.tensors, **extra}, path / "model.safetensors")
    with pytest.raises(CompressError, match=r"model\.wat"):
        load(path)


def test_a_config_of_another_shape_is_refused(pair: Pair, tmp_path: Path) -> None:
    path = broken(pair, tmp_path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, "intermediate_size": 64}))
    with pytest.raises(CompressError, match="the model has it as"):
        load(path)


def _layout(record: dict[str, object]) -> list[str]:
    config = LQConfig(matrices={"x": record})
    return list(config.records()["x"].layout())


def test_quantizing_on_load_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="pre-quantized"), quiet():
        AutoModel.from_pretrained(pair.dense, quantization_config=LQConfig(matrices={}))


def test_registering_twice_changes_nothing() -> None:
    register()
    register()
