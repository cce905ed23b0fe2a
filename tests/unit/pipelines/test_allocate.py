from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import CompressError, UsageError
from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines.allocate import (
    allocate,
    limit_in_bits,
    narrow,
    plain_rounding,
    ranks_for,
    ranks_of,
)
from compress.pipelines.matrices import VOCABULARY, Matrix, matrices_of
from compress.pipelines.model_input import ModelInput
from compress.pipelines.settings import QuantizeSettings, resolve
from compress.quantize.error_table import error_table, menu
from compress.solvers.budget import parse_budget
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelInput:
    path = tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("model") / "tiny")
    checkpoint = Checkpoint(path)
    arch = checkpoint_architecture(checkpoint)
    return ModelInput(name="tiny", path=path, id="0", checkpoint=checkpoint, architecture=arch)


def limit(model: ModelInput, budget: str, rank: int | None = None, **given: Any) -> int:
    settings = resolve(QuantizeSettings, {"budget": budget, **given}, "quick")
    return limit_in_bits(parse_budget(budget), model, matrices_of(model), settings, rank)


def test_every_decoder_linear_is_a_matrix_and_nothing_else(model: ModelInput) -> None:
    matrices = matrices_of(model)
    assert len(matrices) == 2 * 7
    assert sum(m.numel for m in matrices) == model.architecture.decoder_linear_parameters()
    for matrix in matrices:
        assert model.checkpoint.shape(matrix.tensor) == matrix.shape


def test_bits_count_over_the_linears(model: ModelInput) -> None:
    numel = model.architecture.decoder_linear_parameters()
    assert limit(model, "4bit") == 4 * numel
    assert limit(model, "4.5bits") == int(4.5 * numel)


def test_bytes_count_over_the_whole_file(model: ModelInput) -> None:
    one, two = limit(model, "250kB"), limit(model, "251kB")
    assert two - one == 8000
    embeddings = 2 * 128 * 64 * 4
    assert one < 8 * (250_000 - embeddings)


@pytest.mark.parametrize("budget", ["32bit", "33bit", "10MB", "1GiB"])
def test_a_budget_that_is_no_saving_is_refused(budget: str, model: ModelInput) -> None:
    with pytest.raises(UsageError, match="is not below what the model takes now"):
        limit(model, budget)


def test_the_size_of_the_model_is_no_saving_and_less_is(model: ModelInput) -> None:
    with pytest.raises(UsageError):
        limit(model, f"{model.checkpoint.bytes / 1000}kB")
    assert limit(model, f"{(model.checkpoint.bytes - 1) / 1000}kB") > 0
    assert limit(model, "31.999bit") > 0


@pytest.mark.parametrize("rank", [None, 4, 16])
@pytest.mark.parametrize("budget", ["1bit", "1kB"])
def test_a_budget_below_the_menu_names_the_least_that_works(
    budget: str, rank: int | None, model: ModelInput
) -> None:
    with pytest.raises(CompressError, match="is below the smallest this model can be stored in") as refused:
        limit(model, budget, rank)
    assert refused.value.exit_code == 1
    least = re.search(r"Give ([0-9.]+)(bit|MB)", refused.value.remedy)
    assert least is not None
    assert limit(model, least.group(1) + least.group(2), rank) > 0
    step = 0.001 if least.group(2) == "bit" else 0.1
    with pytest.raises(CompressError):
        limit(model, f"{float(least.group(1)) - step:.3f}{least.group(2)}", rank)


def test_factors_that_do_not_count_do_not_raise_the_least(model: ModelInput) -> None:
    assert limit(model, "3bit", 16, budget_includes="none") > 0
    with pytest.raises(CompressError):
        limit(model, "3bit", 16)


def test_factors_in_16_bits_raise_the_least(model: ModelInput) -> None:
    matrices = matrices_of(model)
    numel = sum(matrix.numel for matrix in matrices)
    plain = min(config.storage_bits((64, 64)) for config in menu("quick")) / 64**2
    leasts = {}
    for factors in ("8bit", "16bit"):
        with pytest.raises(CompressError) as refused:
            limit(model, "1bit", 4, factors=factors)
        found = re.search(r"Give ([0-9.]+)bit", refused.value.remedy)
        assert found is not None
        leasts[factors] = float(found.group(1))
    dense = sum(16 * 4 * sum(matrix.shape) for matrix in matrices) / numel
    assert leasts["16bit"] == pytest.approx(plain + dense, rel=0.02)
    assert plain < leasts["8bit"] < leasts["16bit"]


def test_a_rank_is_offered_where_the_matrix_is_wide_enough() -> None:
    matrix = Matrix(layer=0, module="m", tensor="m.weight", shape=(64, 64))
    assert ranks_for(matrix, None) == (0, 4, 8, 16)
    assert ranks_for(matrix, 16) == (16,)
    assert ranks_for(matrix, 32) == ranks_for(matrix, 1000) == (31,)
    assert ranks_for(replace(matrix, shape=(64, 1)), 4) == ranks_for(matrix, 0) == (0,)
    for fixed in (None, 16):
        assert ranks_for(replace(matrix, layer=VOCABULARY), fixed) == (0,)


def group(*rows: int) -> list[Matrix]:
    """q, k and v of one layer with so many rows, and its o."""
    return [
        Matrix(layer=0, module=role, tensor=f"{role}.weight", shape=(size, 64), role=role)
        for role, size in zip(("q", "k", "v", "o"), (*rows, 64), strict=True)
    ]


def test_what_is_fused_gets_the_rank_that_all_of_it_may_take() -> None:
    matrices = group(64, 20, 20)
    assert ranks_of(matrices, 16, "any") == [(16,), (9,), (9,), (16,)]
    assert ranks_of(matrices, 16, "vllm") == [(9,), (9,), (9,), (16,)]
    assert ranks_of(matrices, None, "vllm") == [(0, 4, 8), (0, 4, 8), (0, 4, 8), (0, 4, 8, 16)]
    assert narrow(matrices, 16, "any") == {"k": 9, "v": 9}
    assert narrow(matrices, 16, "vllm") == {"q": 9, "k": 9, "v": 9}
    assert narrow(matrices, 9, "any") == narrow(matrices, None, "vllm") == {}


@pytest.mark.parametrize("runtime", ["any", "vllm"])
@pytest.mark.parametrize("rank", [4, 12, 500])
def test_a_fixed_rank_reaches_every_matrix(rank: int, runtime: str) -> None:
    matrices = group(64, 20, 20)
    settings = resolve(QuantizeSettings, {"objective": "frobenius", "runtime": runtime}, "quick")
    generator = torch.Generator().manual_seed(3)
    tables = [
        error_table(torch.randn(m.shape, generator=generator), menu("quick"), ranks)
        for m, ranks in zip(matrices, ranks_of(matrices, rank, runtime), strict=True)
    ]
    limit = 30 * sum(matrix.numel for matrix in matrices)
    found = allocate(matrices, tables, parse_budget("30bit"), limit, settings, rank)
    ranks = {choice.matrix.module: choice.rank for choice in found.choices}
    narrowest = min(rank, 9)
    assert ranks["o"] == min(rank, 31)
    assert ranks["k"] == ranks["v"] == narrowest
    assert ranks["q"] == (narrowest if runtime == "vllm" else min(rank, 31))


def test_plain_rounding_is_the_best_single_format(model: ModelInput) -> None:
    matrices = matrices_of(model)[:3]
    configs = menu("quick")
    tables = [
        error_table(model.checkpoint.read(m.tensor), configs, (0,), effort="quick", seed=0) for m in matrices
    ]
    bits = [sum(config.storage_bits(m.shape) for m in matrices) for config in configs]
    errors = [sum(float(table.errors[at, 0]) for table in tables) for at in range(len(configs))]
    for bound in sorted({*bits, max(bits) + 1}):
        best = min(e for e, b in zip(errors, bits, strict=True) if b <= bound)
        found = plain_rounding(matrices, tables, bound)
        assert found is not None
        assert found["squared_error"] == best
        assert found["stored_bits"] <= bound
    assert plain_rounding(matrices, tables, min(bits) - 1) is None
    for config, size, error in zip(configs, bits, errors, strict=True):
        only = plain_rounding(matrices, tables, size, config)
        assert only == {"config": config.to_dict(), "stored_bits": size, "squared_error": error}
        assert plain_rounding(matrices, tables, size - 1, config) is None


def test_a_quantized_file_fits_in_the_bytes_it_was_given(
    model: ModelInput, tmp_path: Path, forked_reopen: None
) -> None:
    from compress.pipelines.dispatch import run_verb
    from compress.pipelines.settings import Common

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {i} of a text that has no other purpose. " * 20 for i in range(60)))
    common = Common(run=tmp_path / "run", model=str(model.path), data=str(text), dtype="float32", threads=1)
    stage = run_verb("quantize", common, {"budget": "250kB"}, quiet=True)
    assert (Path(stage["path"]) / "model.safetensors").stat().st_size <= 250_000
