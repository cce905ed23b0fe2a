"""Masks of single weights: chosen as by brute force, packed and unpacked, written and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from compress.errors import CompressError, UsageError
from compress.importance.input_norms import input_norms
from compress.prune.sparsify import Pattern, keep_pattern, keep_share, parse_pattern, weight_scores
from compress.prune.weight_masks import WeightMasks, load_masks, pack_bits, unpack_bits
from tests.tiny import tiny_model
from tests.unit.prune.common import model_architecture

SEEDS = st.integers(0, 2**20)


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 7), st.integers(1, 8), SEEDS)
def test_the_best_of_every_group_stay(rows: int, groups: int, kept: int, more: int, seed: int) -> None:
    of = kept + more
    scores = matrix(rows, groups * of, seed).round()  # with ties
    mask = keep_pattern(scores, Pattern(kept=kept, of=of))
    for row in range(rows):
        for start in range(0, groups * of, of):
            group = scores[row, start : start + of].tolist()
            best = sorted(range(of), key=lambda i, g=group: (-g[i], i))[:kept]
            assert mask[row, start : start + of].nonzero().flatten().tolist() == sorted(best)


@given(st.integers(1, 6), st.integers(1, 20), st.floats(0, 1), SEEDS)
def test_every_row_loses_the_same_share(rows: int, columns: int, ratio: float, seed: int) -> None:
    scores = matrix(rows, columns, seed).abs()
    mask = keep_share(scores, ratio)
    removed = round(ratio * columns)
    assert (~mask).sum(dim=1).tolist() == [removed] * rows
    for row, kept in zip(scores, mask, strict=True):
        if 0 < removed < columns:
            assert row[kept].min() > row[~kept].max()


@given(st.integers(1, 5), st.integers(1, 33), SEEDS)
def test_bits_survive_packing(rows: int, columns: int, seed: int) -> None:
    mask = matrix(rows, columns, seed) > 0
    packed = pack_bits(mask)
    assert packed.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack_bits(packed, columns), mask)
    for row, column in mask.nonzero().tolist():
        assert int(packed[row, column // 8]) >> (column % 8) & 1


def test_rows_that_no_pattern_divides() -> None:
    with pytest.raises(CompressError, match="Rows of 12 weights cannot be divided into groups of 8"):
        keep_pattern(torch.ones(2, 12), Pattern(kept=4, of=8))
    for text in ("4", "8:4", "0:4", "4:4", "a:b", "-1:4", "4:8:2"):
        with pytest.raises(UsageError, match="is not understood"):
            parse_pattern(text)
    assert str(parse_pattern("2:4")) == "2:4"


@pytest.mark.parametrize("kind", ["llama_gqa", "phi3", "gpt2"])
def test_input_norms_are_those_of_the_inputs(kind: str) -> None:
    """Against the inputs themselves, kept whole; and Wanda's score against its formula."""
    model = tiny_model(kind)
    arch = model_architecture(model)
    ids = torch.randint(0, 128, (5, 11), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    names = {arch.module_name(i, spec): spec for i in range(arch.layers) for spec in arch.linears}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, n=name: seen.__setitem__(n, inputs[0].detach().double().flatten(0, 1))
        )
        for name in names
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    norms = input_norms(model, arch, ids, batch=2)
    assert norms.keys() == names.keys()
    for name, norm in norms.items():
        torch.testing.assert_close(norm, seen[name].norm(dim=0), rtol=1e-5, atol=1e-7)
    weight = matrix(3, 4, 1)
    norm = torch.tensor([1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    scores = weight_scores(weight, norm)
    assert all(
        float(scores[o, i]) == pytest.approx(abs(float(weight[o, i])) * float(norm[i]))
        for o in range(3)
        for i in range(4)
    )
    assert torch.equal(weight_scores(weight, None), weight.abs())


def test_masks_survive_the_file(tmp_path: Path) -> None:
    found = {"a.b": matrix(3, 13, 0) > 0, "c": matrix(2, 16, 1) > 0.5}
    masks = WeightMasks(
        pattern="4:8",
        packed={name: pack_bits(mask) for name, mask in found.items()},
        columns={name: mask.shape[1] for name, mask in found.items()},
    )
    assert load_masks(tmp_path) is None
    masks.save(tmp_path / "masks.safetensors")
    again = load_masks(tmp_path)
    assert again is not None
    assert (again.pattern, again.mask("whole")) == ("4:8", None)
    assert again.removed == sum(int((~mask).sum()) for mask in found.values())
    for name, mask in found.items():
        read = again.mask(name)
        assert read is not None
        assert torch.equal(read, mask)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "compress-structure", "format_version": "1"}, "holds no masks"),
        ({"format": "compress-masks", "format_version": "2"}, "holds no masks"),
        (
            {"format": "compress-masks", "format_version": "1", "columns": json.dumps({"a": 17})},
            "its columns",
        ),
        ({"format": "compress-masks", "format_version": "1"}, "its columns"),
    ],
)
def test_files_that_are_no_masks(metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_file({"a.mask": torch.zeros(2, 2, dtype=torch.uint8)}, path, metadata=metadata)
    with pytest.raises(CompressError, match=message):
        WeightMasks.load(path)
    path.write_bytes(b"no")
    with pytest.raises(CompressError, match="not a safetensors file"):
        WeightMasks.load(path)
