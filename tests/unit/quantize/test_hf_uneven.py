"""An uneven model quantized: packed weights of other sizes in every layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.errors import CompressError
from compress.model.checkpoint import Checkpoint, checkpoint_architecture, copy_side_files
from compress.model.load import load_model
from compress.model.writer import CheckpointWriter
from compress.quantize.checkpoint import MatrixRecord, lq_config, lq_tensors, record_of
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import decompose
from compress.quantize.linear import LQLinear
from tests.unit.uneven import IDS, Uneven, make_uneven, relative


def write_pair(made: Uneven, folder: Path) -> None:
    """The small model with every decoder linear quantized, and its dense twin."""
    arch = made.small_arch
    places = {
        arch.tensor_name(i, spec): (arch.module_name(i, spec), spec)
        for i in range(arch.layers)
        for spec in arch.linears_at(i)
    }
    stored: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    records: dict[str, MatrixRecord] = {}
    for name in made.small.names:
        tensor = made.small.read(name)
        if name not in places:
            stored[name] = dense[name] = tensor
            continue
        module, spec = places[name]
        result = decompose(
            tensor.t() if spec.transposed else tensor,
            QuantConfig(bits=4, scale_dtype="float16", block_size=16),
            rank=2,
            factor_config=FACTOR_8BIT,
            iterations=2,
        )
        records[module] = record_of(result)
        stored |= lq_tensors(module, result)
        full = result.dequantize()
        dense[name] = full.t().contiguous() if spec.transposed else full
    config = made.small.config | {"quantization_config": lq_config(records)}
    for path, tensors, values in (("quantized", stored, config), ("dense", dense, made.small.config)):
        with CheckpointWriter(folder / path, config=values) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
        copy_side_files(made.small.path, folder / path)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2", "phi3", "gpt2"])
def test_it_loads_and_equals_its_dense_twin(kind: str, tmp_path: Path) -> None:
    made = make_uneven(kind, tmp_path)
    write_pair(made, tmp_path)
    arch = checkpoint_architecture(Checkpoint(tmp_path / "quantized"))
    assert arch.layer_shapes == made.structure.shapes
    model, twin = (load_model(tmp_path / name, dtype=torch.float32) for name in ("quantized", "dense"))
    packed = {
        name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, LQLinear)
    }
    assert packed == {
        arch.module_name(i, spec): arch.at(i).linear_shape(spec)
        for i in range(arch.layers)
        for spec in arch.linears_at(i)
    }
    with torch.no_grad():
        assert relative(model(input_ids=IDS).logits, twin(input_ids=IDS).logits) <= 1e-5


def test_saved_again_it_is_the_same_checkpoint(tmp_path: Path) -> None:
    made = make_uneven("llama_gqa", tmp_path)
    write_pair(made, tmp_path)
    load_model(tmp_path / "quantized", dtype=torch.float32).save_pretrained(tmp_path / "again")
    first, second = Checkpoint(tmp_path / "quantized"), Checkpoint(tmp_path / "again")
    assert first.fingerprint() == second.fingerprint()
    assert second.config["model_type"] == "compress_llama"
    with torch.no_grad():
        expected, found = (
            load_model(c.path, dtype=torch.float32)(input_ids=IDS).logits for c in (first, second)
        )
    assert torch.equal(found, expected)


def test_a_list_of_other_sizes_is_refused(tmp_path: Path) -> None:
    made = make_uneven("llama_gqa", tmp_path)
    write_pair(made, tmp_path)
    config = tmp_path / "quantized" / "config.json"
    text = config.read_text()
    channels = made.structure.shapes[0].channels
    changed = text.replace(f'"channels": {channels},', f'"channels": {channels - 1},')
    assert changed != text
    config.write_text(changed)
    with pytest.raises(CompressError, match="the model has it as"):
        load_model(tmp_path / "quantized")
