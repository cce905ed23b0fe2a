from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from compress.structure import (
    LayerStructure,
    StructureMap,
    full_layer,
    kept_columns,
    kept_rows,
    structure_map,
)
from tests.unit.prune.common import FUSED, SPECS, architecture, random_layers


def subset(size: int) -> st.SearchStrategy[torch.Tensor]:
    indices = st.sets(st.integers(0, size - 1), min_size=1)
    return indices.map(lambda chosen: torch.tensor(sorted(chosen), dtype=torch.int32))


@st.composite
def maps(draw: st.DrawFn) -> StructureMap:
    kv_heads, queries, channels = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 40))
    layers = draw(st.integers(1, 4))
    return StructureMap(
        layers=tuple(
            LayerStructure(kv_groups=draw(subset(kv_heads)), channels=draw(subset(channels)))
            for _ in range(layers)
        ),
        heads=kv_heads * queries,
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 8)),
        channels=channels,
        base_fingerprint=draw(st.text("0123456789abcdef", max_size=64)),
        family="llama",
    )


@given(maps())
@settings(max_examples=50, deadline=None)
def test_save_and_load_round_trip(structure: StructureMap) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "structure.safetensors"
        structure.save(path)
        assert StructureMap.load(path) == structure
        stored = load_file(path)
    assert {tensor.dtype for tensor in stored.values()} == {torch.int32}
    assert len(stored) == 2 * len(structure.layers)


@given(maps())
@settings(max_examples=50, deadline=None)
def test_uniform_and_identity(structure: StructureMap) -> None:
    sizes = [(len(layer.kv_groups), len(layer.channels)) for layer in structure.layers]
    assert structure.uniform == (sizes[0] if all(size == sizes[0] for size in sizes) else None)
    assert structure.is_identity == all(size == (structure.kv_heads, structure.channels) for size in sizes)


@given(maps())
@settings(max_examples=50, deadline=None)
def test_kept_rows_and_columns_against_ownership_of_every_index(structure: StructureMap) -> None:
    arch = architecture(
        heads=structure.heads,
        kv_heads=structure.kv_heads,
        head_dim=structure.head_dim,
        channels=structure.channels,
        hidden=structure.heads * structure.head_dim,
        layers=len(structure.layers),
    )
    layer = structure.layers[0]
    groups, channels = set(layer.kv_groups.tolist()), set(layer.channels.tolist())
    per_group = arch.heads // arch.kv_heads
    query = [h // per_group in groups for h in range(arch.heads) for _ in range(arch.head_dim)]
    key = [h in groups for h in range(arch.kv_heads) for _ in range(arch.head_dim)]
    channel = [c in channels for c in range(arch.channels)]
    rows = {
        "q": query,
        "k": key,
        "v": key,
        "gate": channel,
        "up": channel,
        "qkv": query + key + key,
        "gate_up": channel + channel,
    }
    columns = {"o": query, "down": channel}
    for spec in (*SPECS, *FUSED):
        for expected, found in (
            (rows.get(spec.role), kept_rows(arch, spec, layer)),
            (columns.get(spec.role), kept_columns(arch, spec, layer)),
        ):
            if expected is None or all(expected):
                assert found is None
            else:
                assert found is not None
                assert found.tolist() == [index for index, kept in enumerate(expected) if kept]


def test_full_layer_keeps_everything() -> None:
    arch = architecture()
    structure = structure_map(arch, [full_layer(arch)] * arch.layers, base_fingerprint="f")
    assert structure.is_identity
    for spec in (*SPECS, *FUSED):
        assert kept_rows(arch, spec, structure.layers[0]) is None
        assert kept_columns(arch, spec, structure.layers[0]) is None


@pytest.mark.parametrize(
    ("kept", "fault"),
    [
        (torch.tensor([1, 0], dtype=torch.int32), "not sorted"),
        (torch.tensor([1, 1], dtype=torch.int32), "not sorted"),
        (torch.tensor([0, 4], dtype=torch.int32), "outside 0 to 3"),
        (torch.tensor([-1, 2], dtype=torch.int32), "outside 0 to 3"),
        (torch.tensor([], dtype=torch.int32), "are none"),
        (torch.tensor([0, 1]), "int32"),
    ],
)
def test_bad_indices_are_refused(kept: torch.Tensor, fault: str) -> None:
    arch = architecture(layers=1)
    layer = LayerStructure(kv_groups=kept, channels=full_layer(arch).channels)
    with pytest.raises(CompressError, match=fault):
        structure_map(arch, [layer], base_fingerprint="")


def test_other_model_is_refused() -> None:
    arch = architecture()
    structure = structure_map(arch, random_layers(arch, 2, 8), base_fingerprint="")
    structure.check_matches(arch)
    with pytest.raises(CompressError, match="4 KV groups of width 4 and 24 channels, but the model has"):
        structure.check_matches(architecture(channels=32))


def test_files_that_are_no_structure(tmp_path: Path) -> None:
    arch = architecture()
    good = tmp_path / "good.safetensors"
    structure_map(arch, random_layers(arch, 2, 8), base_fingerprint="abc").save(good)
    metadata = {
        "format": "compress-structure",
        "format_version": "1",
        "layers": "2",
        "heads": "8",
        "kv_heads": "4",
        "head_dim": "4",
        "channels": "24",
    }
    tensors = load_file(good)

    def attempt(match: str, values: dict[str, torch.Tensor], meta: dict[str, str]) -> None:
        path = tmp_path / "bad.safetensors"
        save_file(values, path, metadata=meta)
        with pytest.raises(CompressError, match=match):
            StructureMap.load(path)

    attempt("not a structure file", tensors, {})
    attempt("format version 2", tensors, {**metadata, "format_version": "2"})
    attempt("incomplete", tensors, {key: value for key, value in metadata.items() if key != "heads"})
    attempt("incomplete", tensors, {**metadata, "layers": "3"})
    attempt("incomplete", {**tensors, "extra": torch.zeros(1)}, metadata)
    attempt("outside", tensors, {**metadata, "channels": "4"})
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(CompressError, match="not a safetensors file"):
        StructureMap.load(tmp_path / "text")
    with pytest.raises(CompressError, match="no structure file"):
        StructureMap.load(tmp_path / "absent")
