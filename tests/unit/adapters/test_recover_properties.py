"""Invariants of recovery (METHODS §2.2, §2.4) over random structures, head layouts, initialisations and dtypes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.adapters.adapter_file import PREFIX, AdapterFile, write_adapter
from compress.adapters.recover import RecoveryReport, recover_adapter
from compress.model.architecture import Architecture, LayerShape
from compress.model.checkpoint import Checkpoint
from compress.structure import LayerStructure, StructureMap, kept_columns, kept_rows, structure_map
from tests.unit.prune.common import FUSED, SPECS, architecture
from tests.unit.uneven import layer_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One adapter on one small model."""

    arch: Architecture
    structure: StructureMap
    rank: int
    alpha: int
    rslora: bool
    start: str
    dtype: torch.dtype
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads, queries = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    arch = architecture(
        hidden=draw(st.integers(2, 9)),
        layers=draw(st.integers(1, 3)),
        heads=kv_heads * queries,
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 4)),
        channels=draw(st.integers(1, 12)),
        linears=draw(st.sampled_from([SPECS, FUSED, tuple(replace(s, transposed=True) for s in SPECS)])),
    )
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    layers: list[LayerStructure] = []
    for _ in range(arch.layers):
        shape = LayerShape(
            kv_heads=draw(st.integers(0, kv_heads)),
            queries=draw(st.integers(1, queries)),
            channels=draw(st.integers(0, arch.channels)),
        )
        if not layers and not shape.kv_heads and not shape.channels:
            shape = replace(shape, channels=1)  # something is left to adapt
        layers.append(layer_of(arch, shape, generator))
    return Case(
        arch=arch,
        structure=structure_map(arch, layers, base_fingerprint="f"),
        rank=draw(st.integers(1, 3)),
        alpha=draw(st.integers(1, 9)),
        rslora=draw(st.booleans()),
        start=draw(st.sampled_from(["zero", "all", "some"])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=seed,
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Recovery looks at it for linears outside of the layers only, and these adapters have one: lm_head."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "config.json").write_text("{}")
    save_file({"lm_head.weight": torch.zeros(5, 4)}, folder / "model.safetensors")
    return Checkpoint(folder)


def write_small(case: Case, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A random adapter on the small model, as PEFT names it; returns the initial factors by module."""
    small = replace(case.arch, layer_shapes=case.structure.shapes)
    shapes = {
        small.module_name(layer, spec): small.at(layer).linear_shape(spec)
        for layer in range(small.layers)
        for spec in small.linears_at(layer)
    } | {"lm_head": (5, 4)}
    generator = torch.Generator().manual_seed(case.seed + 1)

    def factors(out: int, into: int) -> tuple[Tensor, Tensor]:
        pair = (
            torch.randn(case.rank, into, generator=generator),
            torch.randn(out, case.rank, generator=generator),
        )
        return pair[0].to(case.dtype), pair[1].to(case.dtype)

    def named(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {
            f"{PREFIX}{module}.lora_{side}.weight": factor
            for module, pair in pairs.items()
            for side, factor in zip("AB", pair, strict=True)
        }

    trained = {module: factors(*shape) for module, shape in shapes.items()}
    starts = {
        module: factors(*shape)
        for index, (module, shape) in enumerate(shapes.items())
        if case.start == "all" or (case.start == "some" and index % 2)
    }
    config = {
        "peft_type": "LORA",
        "r": case.rank,
        "lora_alpha": case.alpha,
        "use_rslora": case.rslora,
        "base_model_name_or_path": "small",
        "init_lora_weights": "pissa" if case.start == "all" else True,
    }
    write_adapter(folder, config, named(trained), named(starts))
    return starts


def places(case: Case) -> Iterator[tuple[str, tuple[int, int], Tensor, Tensor]]:
    """Module, full shape, kept rows and kept columns (all of them spelled out) of every linear that is left."""
    small = replace(case.arch, layer_shapes=case.structure.shapes)
    for index, layer in enumerate(case.structure.layers):
        for spec in small.linears_at(index):
            out, into = case.arch.linear_shape(spec)
            rows, columns = kept_rows(case.arch, spec, layer), kept_columns(case.arch, spec, layer)
            yield (
                case.arch.module_name(index, spec),
                (out, into),
                torch.arange(out) if rows is None else rows,
                torch.arange(into) if columns is None else columns,
            )
    yield "lm_head", (5, 4), torch.arange(5), torch.arange(4)


def delta(file: AdapterFile, module: str) -> Tensor:
    a, b = file.factors(module)
    return file.scaling(module).value * b.double() @ a.double()


def recovered(case: Case, full: Checkpoint, folder: Path, rank: int | None = None) -> RecoveryReport:
    return recover_adapter(
        folder / "small",
        case.structure,
        case.arch,
        full,
        folder / "out",
        full_name="org/full",
        compress_rank=rank,
    )


@given(cases())
def test_the_recovered_adapter(full: Checkpoint, case: Case) -> None:
    """Slicing gives what training changed, the rest is zero; name, dtype, rank and scale are as they must be."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        starts = write_small(case, folder / "small")
        report = recovered(case, full, folder)
        with AdapterFile(folder / "small") as small, AdapterFile(folder / "out") as out:
            assert set(out.modules) == set(small.modules)
            for module, shape, rows, columns in places(case):
                change = delta(small, module)
                if module in starts:
                    a0, b0 = starts[module]
                    change -= small.scaling(module).value * b0.double() @ a0.double()
                found = delta(out, module)
                assert found.shape == shape
                cut = found[rows][:, columns]
                torch.testing.assert_close(cut, change, rtol=1e-9, atol=1e-9)
                assert float(found.abs().sum()) == pytest.approx(float(cut.abs().sum()), rel=1e-12, abs=1e-12)
                whole = torch.zeros(shape, dtype=torch.bool)
                whole[rows[:, None], columns] = True
                assert not found[~whole].any()
                assert out.scaling(module).rank == case.rank * (2 if module in starts else 1)
                assert out.scaling(module).value == pytest.approx(small.scaling(module).value, rel=1e-12)
                a, b = out.factors(module)
                assert {a.dtype, b.dtype} == {case.dtype}
                if module not in starts:  # factor by factor, bit by bit
                    assert torch.equal(a[:, columns], small.factors(module)[0])
                    assert torch.equal(b[rows], small.factors(module)[1])
            config = out.config
            assert not out.has_initial_factors
        assert config["base_model_name_or_path"] == "org/full"
        assert config["init_lora_weights"] is True
        assert report.differences == len(starts)


@given(cases())
def test_nothing_pruned_is_the_identity(full: Checkpoint, case: Case) -> None:
    whole = LayerShape(
        kv_heads=case.arch.kv_heads, queries=case.arch.queries_per_group, channels=case.arch.channels
    )
    layers = [layer_of(case.arch, whole, torch.Generator())] * case.arch.layers
    case = replace(case, structure=structure_map(case.arch, layers, base_fingerprint="f"), start="zero")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_small(case, folder / "small")
        assert recovered(case, full, folder).scattered == 0
        files = [load_file(folder / name / "adapter_model.safetensors") for name in ("small", "out")]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@given(cases(), st.integers(1, 4))
def test_a_lower_rank_is_the_best_there_is(full: Checkpoint, case: Case, rank: int) -> None:
    """Against a decomposition of the whole delta; the reported errors are the true ones."""
    case = replace(case, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_small(case, folder / "small")
        recovered(case, full, folder)
        with AdapterFile(folder / "out") as out:
            exact = {module: delta(out, module) for module in out.modules}
        (folder / "out").rename(folder / "exact")
        report = recovered(case, full, folder, rank)
        config = json.loads((folder / "out" / "adapter_config.json").read_text())
        assert max([config["r"], *config["rank_pattern"].values()]) <= rank
        with AdapterFile(folder / "out") as out:
            for module, whole in exact.items():
                error = float((whole - delta(out, module)).norm())
                tail = float(torch.linalg.svdvals(whole)[rank:].norm())
                assert error == pytest.approx(tail, rel=1e-3, abs=1e-4 * float(whole.norm()) + 1e-12)
                norm = float(whole.norm())
                assert report.truncation[module] * norm == pytest.approx(tail, rel=1e-3, abs=1e-5 * norm)
