"""The benchmark of kernels for few tokens: variants compile and have every tile once; its reference holds."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.benchmarks import few_tokens
from compress.benchmarks.few_tokens import CHECKS, TIMES, instances, main, report, summary
from compress.benchmarks.few_tokens_variants import VARIANTS, Sizes, cut, operands, source, text
from compress.kernels.cuda.compiler import SOURCES
from compress.kernels.native_product import dequantize
from compress.quantize.native_form import geometry

NVCC = shutil.which("nvcc")
RINGS = [name for name, variant in VARIANTS.items() if variant.macros]


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("name", RINGS)
def test_rings_compile_without_a_warning(name: str, tmp_path: Path) -> None:
    file = tmp_path / "ring.cu"
    common = (SOURCES / "common.cuh").read_text(encoding="utf-8")
    some = ("few_tokens<4, 8, 1, 2, 16, 2, true, true>", "few_tokens<3, 3, 2, 2, 16, 4, false, true>")
    uses = ", ".join(f"(void*){instance}" for instance in some)
    file.write_text(f"{common}\n{text(VARIANTS[name])}\nvoid* uses[] = {{{uses}}};\n", encoding="utf-8")
    done = subprocess.run(
        [str(NVCC), "-std=c++17", "-arch=sm_90", "-ptx", "-Werror=all-warnings", "-o", "ring.ptx", str(file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = (tmp_path / "ring.ptx").read_text(encoding="utf-8")
    assert len(re.findall(r"\.entry", made)) == len(some)
    assert ("griddepcontrol.wait" in made) == VARIANTS[name].early


def test_every_variant_has_a_source_of_its_own() -> None:
    files = {name: source(variant) for name, variant in VARIANTS.items()}
    assert len(set(files.values())) == len(VARIANTS)
    assert (SOURCES / files["package"]).is_file()
    assert all(Path(files[name]).read_text(encoding="utf-8") == text(VARIANTS[name]) for name in RINGS)


@pytest.mark.parametrize("processors", [1, 7, 132])
@pytest.mark.parametrize("name", ["package", "ring, early"])
def test_a_cut_has_every_tile_once(name: str, processors: int) -> None:
    for sizes in (*CHECKS, *TIMES):
        g = geometry((sizes.rows, sizes.columns), sizes.config)
        found = cut(VARIANTS[name], g, sizes.tokens, sizes.rank, processors)
        assert 1 <= found.blocks <= processors
        if name == "package":
            assert 0 <= 2 * found.each - g.tiles < 2  # pairs of tiles, which blocks take in turns
            continue
        more = (
            g.tiles - found.each * found.blocks
        )  # as ring.cu reckons: so many blocks, the last, have one more
        assert 0 <= more < found.blocks
        at_once = int(found.instance.split(", ")[3])
        assert at_once == 6 or found.each + (more > 0) <= at_once


def test_instances_are_named_as_the_package_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.kernels.cuda import product

    asked: list[tuple[str, tuple[int, int, int]]] = []
    monkeypatch.setattr(product, "kernel", lambda index, file, instance, shared: instance)
    monkeypatch.setattr(
        product, "launch", lambda index, instance, grid, *_, **__: asked.append((instance, grid))
    )
    monkeypatch.setattr(product, "_index", lambda x: 0)
    monkeypatch.setattr(product, "counters", lambda index: 1)
    properties: Any = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for sizes in CHECKS[-6:-2]:
        of = operands(sizes, torch.device("cpu"), 0)
        product.few_tokens(of.x, of.matrix, of.factors)
        expected = cut(VARIANTS["package"], of.matrix.geometry, sizes.tokens, sizes.rank, 132)
        assert asked[-1] == (expected.instance, (expected.blocks, 1, 1))
    assert asked[-1][0] in {instance for _, instance in instances(["package"], TIMES, 132)}


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(rows=50, columns=104, bits=3, tokens=2, rank=4, scale_bits=3, block=32, group=8),
        Sizes(rows=38, columns=96, bits=4, tokens=1),
    ],
)
def test_the_reference_is_the_matrix_that_kernels_get(sizes: Sizes) -> None:
    of = operands(sizes, torch.device("cpu"), 1)
    weights = of.weights()
    assert weights.shape == (sizes.rows, sizes.columns)
    assert torch.equal(dequantize(of.matrix).double(), weights)
    other = of.copied()
    assert torch.equal(other.matrix.codes, of.matrix.codes)
    assert other.matrix.codes.data_ptr() != of.matrix.codes.data_ptr()
    assert (of.factors is None) == (other.factors is None) == (sizes.rank == 0)


def test_figures_and_failures_are_reported() -> None:
    ways = {"queued": [4e-6, 2e-6, 3e-6], "alone": [5e-6, 5e-6, 6e-6]}
    found = summary(ways, 1.5e-6)
    assert found["share_of_floor"] == 0.5
    assert found["queued_least_seconds"], found["queued_most_seconds"] == (2e-6, 4e-6)
    failed = {"products": 2, "passed": 1, "largest_error": 0.5, "failed": {"4 x 4": {"problem": "lost"}}}
    case = {"floor_seconds": 1.5e-6, "contestants": {"ring": found}}
    said = report({"checks, ring": failed, "case": case}, ["layer, rank 0"])
    for words in ("1 of 2", "4 x 4: {'problem': 'lost'}", "3.00 us (50% of the floor)", "layer, rank 0"):
        assert words in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(few_tokens, "nvrtc", lambda: None)
    assert main(["--build"]) == 2
    assert "NVRTC" in capsys.readouterr().err
