from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from compress.model.architecture import Architecture
from compress.prune.slice import slice_weight
from compress.structure import (
    LayerShape,
    LayerStructure,
    StructureMap,
    composed,
    full_layer,
    kept_columns,
    kept_heads,
    kept_rows,
    structure_map,
)
from tests.unit.prune.common import FUSED, SPECS, architecture, random_layers


def subset(size: int, least: int = 0) -> st.SearchStrategy[torch.Tensor]:
    return st.sets(st.integers(0, size - 1), min_size=least).map(indices)


def indices(chosen: Iterable[int]) -> torch.Tensor:
    return torch.tensor(sorted(chosen), dtype=torch.int32)


@st.composite
def maps(draw: st.DrawFn) -> StructureMap:
    """MHA (one query head a group), GQA and MQA (one group); layers that keep nothing of a branch are among them."""
    kv_heads, queries, channels = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 40))

    def layer() -> LayerStructure:
        groups = draw(subset(kv_heads))
        heads = None
        if draw(st.booleans()):
            kept = draw(st.integers(1, queries))
            choice = st.sets(st.integers(0, queries - 1), min_size=kept, max_size=kept)
            heads = indices(group * queries + head for group in groups.tolist() for head in draw(choice))
        return LayerStructure(kv_groups=groups, channels=draw(subset(channels)), query_heads=heads)

    return StructureMap(
        layers=tuple(layer() for _ in range(draw(st.integers(1, 4)))),
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
    with_heads = sum(layer.query_heads is not None for layer in structure.layers)
    assert len(stored) == 2 * len(structure.layers) + with_heads


def counted(structure: StructureMap, layer: LayerStructure) -> LayerShape:
    """Sizes by counting the query heads of the first kept group."""
    groups, queries = layer.kv_groups.tolist(), structure.heads // structure.kv_heads
    if layer.query_heads is not None and groups:
        queries = sum(head // queries == groups[0] for head in layer.query_heads.tolist())
    return LayerShape(kv_heads=len(groups), queries=queries, channels=len(layer.channels))


@given(maps())
@settings(max_examples=100, deadline=None)
def test_shapes_uniform_and_identity(structure: StructureMap) -> None:
    sizes = [counted(structure, layer) for layer in structure.layers]
    assert list(structure.shapes) == sizes
    alike = all(size == sizes[0] for size in sizes) and sizes[0].kv_heads > 0 and sizes[0].channels > 0
    assert structure.uniform == (sizes[0] if alike else None)
    whole = LayerShape(
        kv_heads=structure.kv_heads,
        queries=structure.heads // structure.kv_heads,
        channels=structure.channels,
    )
    assert structure.is_identity == all(size == whole for size in sizes)


@given(maps())
@settings(max_examples=100, deadline=None)
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
    heads = [h for h in range(arch.heads) if h // per_group in groups]
    if layer.query_heads is not None:
        heads = layer.query_heads.tolist()
    assert kept_heads(arch, layer).tolist() == heads
    query = [h in heads for h in range(arch.heads) for _ in range(arch.head_dim)]
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


@pytest.mark.parametrize(
    ("heads", "fault"),
    [
        ([0, 1, 4], "not the same number in every kept KV group"),  # two of group 0, one of group 2
        ([0, 1], "not the same number"),  # none of group 2
        ([0, 2, 4], "not the same number"),  # one of group 1, which is pruned
        ([4, 0], "not sorted"),
        ([0, 8], "outside 0 to 7"),
    ],
)
def test_query_heads_that_do_not_fit_their_groups_are_refused(heads: list[int], fault: str) -> None:
    arch = architecture(layers=2)
    layer = LayerStructure(
        kv_groups=indices([0, 2]), channels=indices([1]), query_heads=torch.tensor(heads, dtype=torch.int32)
    )
    with pytest.raises(CompressError, match=f"query heads of layer 1 .*{fault}"):
        structure_map(arch, [full_layer(arch), layer], base_fingerprint="")


def test_query_heads_without_a_group_are_refused() -> None:
    arch = architecture(layers=1)
    layer = LayerStructure(kv_groups=indices([]), channels=indices([1]), query_heads=indices([0]))
    with pytest.raises(CompressError, match="belong to no KV group"):
        structure_map(arch, [layer], base_fingerprint="")


def test_layers_of_the_same_heads_are_equal_only_with_the_same_query_heads() -> None:
    arch = architecture(layers=1)
    groups, channels = indices([0, 2]), indices([1])

    def made(heads: list[int] | None) -> StructureMap:
        query_heads = None if heads is None else indices(heads)
        layer = LayerStructure(kv_groups=groups, channels=channels, query_heads=query_heads)
        return structure_map(arch, [layer], base_fingerprint="")

    assert made([0, 4]) == made([0, 4])
    assert made([0, 4]) != made([0, 5])
    assert made([0, 4]) != made(None)


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


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    arch = architecture()
    structure = structure_map(arch, random_layers(arch, 2, 8), base_fingerprint="abc")
    path = tmp_path / "structure.safetensors"
    structure.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format_version"] == "2"
    save_file(load_file(path), path, metadata={**metadata, "format_version": "1"})
    assert StructureMap.load(path) == structure


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
    attempt("format version 3", tensors, {**metadata, "format_version": "3"})
    attempt("incomplete", tensors, {key: value for key, value in metadata.items() if key != "heads"})
    for key, value in (
        ("layers", "3"),
        ("layers", "0"),
        ("heads", "many"),
        ("kv_heads", "0"),
        ("heads", "6"),
        ("layers", "999999999999"),  # nothing is counted up to a number that a file names
        ("layers", "9" * 5000),
        ("layers", "\N{ARABIC-INDIC DIGIT TWO}"),
        ("heads", "4000000000"),
        ("head_dim", "4000000000"),
        ("channels", "4000000000"),
    ):
        attempt("incomplete", tensors, {**metadata, key: value})
    attempt("incomplete", {**tensors, "extra": torch.zeros(1)}, metadata)
    attempt("outside", tensors, {**metadata, "channels": "4"})
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(CompressError, match="not a safetensors file"):
        StructureMap.load(tmp_path / "text")
    with pytest.raises(CompressError, match="no structure file"):
        StructureMap.load(tmp_path / "absent")


@st.composite
def layer_of(draw: st.DrawFn, arch: Architecture, shape: LayerShape) -> LayerStructure:
    """Random indices of this shape; query heads are listed or, where all stay, sometimes not."""

    def some(size: int, count: int) -> torch.Tensor:
        return indices(draw(st.sets(st.integers(0, size - 1), min_size=count, max_size=count)))

    groups, queries = some(arch.kv_heads, shape.kv_heads), arch.queries_per_group
    heads = [group * queries + some(queries, shape.queries) for group in groups.tolist()]
    listed = shape.queries < queries or draw(st.booleans())
    return LayerStructure(
        kv_groups=groups,
        channels=some(arch.channels, shape.channels),
        query_heads=(torch.cat(heads).int() if heads else groups) if listed else None,
    )


@st.composite
def two_rounds(draw: st.DrawFn) -> tuple[Architecture, StructureMap, Architecture, StructureMap]:
    """A model, a uniform structure, what that leaves, and any structure of what is left."""
    kv_heads, queries, channels = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    layers = draw(st.integers(1, 3))
    arch = architecture(
        layers=layers, heads=kv_heads * queries, kv_heads=kv_heads, head_dim=2, channels=channels, hidden=3
    )
    shape = LayerShape(
        kv_heads=draw(st.integers(1, kv_heads)),
        queries=draw(st.integers(1, queries)),
        channels=draw(st.integers(1, channels)),
    )
    first = structure_map(arch, [draw(layer_of(arch, shape)) for _ in range(layers)], base_fingerprint="a")
    left = replace(
        arch, heads=shape.kv_heads * shape.queries, kv_heads=shape.kv_heads, channels=shape.channels
    )
    smaller = [
        LayerShape(
            kv_heads=draw(st.integers(0, shape.kv_heads)),
            queries=draw(st.integers(1, shape.queries)),
            channels=draw(st.integers(0, shape.channels)),
        )
        for _ in range(layers)
    ]
    then = structure_map(left, [draw(layer_of(left, one)) for one in smaller], base_fingerprint="b")
    return arch, first, left, then


@given(two_rounds())
@settings(max_examples=60, deadline=None)
def test_two_structures_in_one_cut_what_they_cut_one_after_the_other(
    case: tuple[Architecture, StructureMap, Architecture, StructureMap],
) -> None:
    arch, first, left, then = case
    both = composed(first, then)
    both.check_matches(arch)
    assert (both.base_fingerprint, both.family) == ("a", "llama")
    assert both.shapes == tuple(
        replace(shape, queries=arch.queries_per_group) if not shape.kv_heads else shape
        for shape in then.shapes
    )
    for outer, inner, one in zip(first.layers, then.layers, both.layers, strict=True):
        for spec in (*SPECS, *FUSED):
            rows, columns = arch.linear_shape(spec)
            numbered = torch.arange(rows * columns).view(rows, columns)
            twice = slice_weight(slice_weight(numbered, arch, spec, outer), left, spec, inner)
            assert torch.equal(slice_weight(numbered, arch, spec, one), twice)


def test_a_structure_of_another_model_is_not_composed() -> None:
    arch = architecture()
    first = structure_map(arch, random_layers(arch, 2, 8), base_fingerprint="")
    left = replace(arch, heads=4, kv_heads=2, channels=8)
    good = structure_map(left, random_layers(left, 1, 4), base_fingerprint="")
    assert composed(first, good).uniform == LayerShape(kv_heads=1, queries=2, channels=4)
    for other in (replace(left, channels=9), replace(left, heads=2), replace(left, layers=1), arch):
        structure = structure_map(other, random_layers(other, 1, 4), base_fingerprint="")
        with pytest.raises(CompressError, match="not made for what the first one leaves"):
            composed(first, structure)
    uneven = structure_map(arch, (full_layer(arch), *first.layers[1:]), base_fingerprint="")
    with pytest.raises(CompressError, match="not made for what the first one leaves"):
        composed(uneven, good)
