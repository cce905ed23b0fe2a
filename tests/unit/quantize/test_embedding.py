"""Embeddings as codes: rows against the whole matrix, tied output layers, loading and saving."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.adapters.loss import TokenLoss
from compress.errors import CompressError
from compress.kernels.library import library
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.model.load import load_model
from compress.model.writer import CheckpointWriter
from compress.quantize.blockwise import quantize_blockwise
from compress.quantize.checkpoint import MatrixRecord, lq_config, lq_tensors, record_of
from compress.quantize.config import QuantConfig
from compress.quantize.decompose import decompose
from compress.quantize.embedding import LQEmbedding, LQTiedHead, embedding_multiplier
from compress.quantize.native_form import rows_of_tiles, tiled_form
from compress.quantize.packing import pack, unpack_at
from tests.tiny import VOCAB, tiny_checkpoint

CONFIG = QuantConfig(bits=3, scale_bits=3, scale_dtype="float16", block_size=16, group_size=16)
IDS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_codes_are_read_one_by_one(bits: int, count: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=g)
    positions = torch.randint(0, count, (3, 5), generator=g)
    assert torch.equal(unpack_at(pack(codes, bits), bits, count, positions), codes[positions])


@pytest.mark.parametrize(
    ("bits", "codebook"), [(2, "normal"), (3, "normal"), (4, "normal"), (8, "normal"), (3, "learned")]
)
@pytest.mark.parametrize("columns", [40, 41, 7])
def test_rows_are_those_of_the_whole_matrix(bits: int, codebook: Any, columns: int) -> None:
    config = QuantConfig(
        bits=bits, scale_bits=3, scale_dtype="float16", block_size=16, group_size=4, codebook=codebook
    )
    g = torch.Generator().manual_seed(bits)
    stored = quantize_blockwise(torch.randn(37, columns, generator=g), config)
    index = torch.randint(0, 37, (3, 4), generator=g)
    assert torch.equal(stored.rows(index), stored.dequantize()[index])
    if library() is not None:
        rows = rows_of_tiles(tiled_form(stored), config, stored.scale_max, index)
        assert torch.equal(rows, stored.dequantize()[index])


def quantized_copy(kind: str, folder: Path) -> tuple[Path, torch.Tensor]:
    """A tiny model whose embedding alone is quantized; the folder, and the values its codes stand for."""
    source = Checkpoint(tiny_checkpoint(kind, folder / "dense"))
    name = checkpoint_architecture(source).embedding
    found = decompose(source.read(name), CONFIG, rank=0)
    module = name.removesuffix(".weight")
    config = source.config | {"quantization_config": lq_config({module: record_of(found)})}
    with CheckpointWriter(folder / "small", config=config) as writer:
        for other in source.names:
            if other != name:
                writer.add(other, source.read(other))
        for part, tensor in lq_tensors(module, found).items():
            writer.add(part, tensor)
        writer.finish()
    return folder / "small", found.quantized.dequantize()


def dense_twin(kind: str, folder: Path, values: torch.Tensor) -> Any:
    model: Any = load_model(folder / "dense", dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(values)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float()
    return found


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied", "gemma2", "gemma3_text", "gpt2"])
def test_a_model_computes_as_with_the_dense_values_and_saves_what_it_loaded(
    kind: str, tmp_path: Path
) -> None:
    small, values = quantized_copy(kind, tmp_path)
    model, twin = load_model(small, dtype=torch.float32), dense_twin(kind, tmp_path, values)
    assert isinstance(model.get_input_embeddings(), LQEmbedding)
    tied = checkpoint_architecture(Checkpoint(small)).tied
    assert isinstance(model.get_output_embeddings(), LQTiedHead) == tied
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(copy.deepcopy(model)), logits(model), rtol=0, atol=0)

    model.save_pretrained(tmp_path / "again")
    before, after = Checkpoint(small), Checkpoint(tmp_path / "again")
    assert sorted(before.names) == sorted(after.names)
    for name in before.names:
        assert torch.equal(before.read(name), after.read(name))
    half = load_model(tmp_path / "again", dtype=torch.bfloat16)
    assert half.get_input_embeddings()(IDS).dtype == torch.bfloat16
    assert (logits(half) - logits(twin)).norm() < 0.05 * logits(twin).norm()


def test_the_loss_of_a_tied_model_and_its_gradient_are_those_of_the_dense_values(tmp_path: Path) -> None:
    small, values = quantized_copy("llama_tied", tmp_path)
    gradients = []
    for model in (load_model(small, dtype=torch.float32), dense_twin("llama_tied", tmp_path, values)):
        model.requires_grad_(False)
        weight = model.model.norm.weight.requires_grad_(True)
        loss = TokenLoss(model)(IDS, IDS)
        loss.backward()
        gradients.append((loss.detach(), weight.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_dequantized_model_is_a_plain_one(tmp_path: Path) -> None:
    small, values = quantized_copy("llama_tied", tmp_path)
    model = load_model(small, dtype=torch.float32)
    expected = logits(model)
    plain: Any = model.dequantize()
    assert type(plain.get_input_embeddings()) is nn.Embedding
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert torch.equal(plain.get_input_embeddings().weight.float(), values)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)


def test_scaled_embeddings_stay_quantized(tmp_path: Path) -> None:
    small, _ = quantized_copy("gemma3_text", tmp_path)
    model: Any = load_model(small, dtype=torch.float32)
    assert model.get_input_embeddings().multiplier == pytest.approx(model.config.hidden_size**0.5)
    with pytest.raises(CompressError, match="scales its rows"):
        model.dequantize()


def test_casts_change_the_result_and_never_the_stored_values() -> None:
    found = decompose(torch.randn(9, 20, generator=torch.Generator().manual_seed(1)), CONFIG, rank=0)
    layer = LQEmbedding(record_of(found), dtype=torch.float32)
    layer.load_state_dict({k[1:]: v for k, v in lq_tensors("", found).items()})
    rows = layer(torch.arange(9))
    for dtype in (torch.float16, torch.bfloat16):
        layer.to(dtype)
        assert layer(torch.arange(9)).dtype == dtype
        assert torch.equal(layer.dequantized_weight(), found.quantized.dequantize())
        assert torch.equal(layer(torch.arange(9)), rows.to(dtype))


def test_what_is_no_plain_embedding_is_refused() -> None:
    class Odd(nn.Embedding):
        """It may do anything beyond a look-up."""

    with pytest.raises(CompressError, match="Odd"):
        embedding_multiplier(Odd(4, 4))
    with pytest.raises(CompressError, match="rank 2"):
        LQEmbedding(MatrixRecord(shape=(9, 20), config=CONFIG, rank=2, factor_config=CONFIG))
