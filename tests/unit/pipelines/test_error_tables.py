"""Sampled error tables of large matrices: what a choice picks from them is computed from all rows."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines import error_tables
from compress.pipelines.allocate import Allocation, allocate, limit_in_bits
from compress.pipelines.dispatch import run_verb
from compress.pipelines.error_tables import all_exact, build_tables, exact_tables
from compress.pipelines.matrices import matrices_of, read_matrix
from compress.pipelines.model_input import ModelInput
from compress.pipelines.reporter import Reporter
from compress.pipelines.settings import Common, QuantizeSettings, resolve
from compress.pipelines.stage import Context
from compress.pipelines.workspace import Workspace
from compress.quantize.config import QuantConfig
from compress.quantize.error_table import ErrorTable, error_table, menu
from compress.solvers.budget import parse_budget
from tests.tiny import tiny_checkpoint

BUDGET = "4.5bit"
GIVEN = {"budget": BUDGET, "objective": "frobenius", "menu": "quick"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelInput:
    checkpoint = Checkpoint(tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("model") / "tiny"))
    arch = checkpoint_architecture(checkpoint)
    return ModelInput(name="tiny", path=checkpoint.path, id="0", checkpoint=checkpoint, architecture=arch)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of more than 64 rows are sampled."""
    monkeypatch.setattr(error_tables, "LARGE", 64)
    monkeypatch.setattr(error_tables, "SAMPLE", 12)


def context(folder: Path) -> Context:
    common = Common(run=folder / "run", dtype="float32", threads=1)
    return Context(common=common, workspace=Workspace(common.run), reporter=Reporter(quiet=True))


def full_tables(model: ModelInput) -> list[ErrorTable]:
    return [error_table(read_matrix(model, m), menu("quick"), effort="quick") for m in matrices_of(model)]


def built(model: ModelInput, folder: Path) -> tuple[QuantizeSettings, list[ErrorTable]]:
    settings = resolve(QuantizeSettings, GIVEN, "quick")
    matrices = matrices_of(model)
    return settings, build_tables(
        context(folder), model, matrices, settings, None, folder / "tables", None, {}, None
    )


def chosen(
    model: ModelInput, settings: QuantizeSettings, tables: list[ErrorTable], **given: Any
) -> Allocation:
    matrices, budget = matrices_of(model), parse_budget(BUDGET)
    limit = limit_in_bits(budget, model, matrices, settings, None)
    return allocate(matrices, tables, budget, limit, settings, None, **given)


@pytest.mark.usefixtures("small")
def test_only_large_matrices_are_sampled_and_what_is_picked_is_exact(
    model: ModelInput, tmp_path: Path
) -> None:
    settings, tables = built(model, tmp_path)
    full = full_tables(model)
    large = [matrix.shape[0] > 64 for matrix in matrices_of(model)]
    assert 0 < sum(large) < len(large)
    assert [table.sample for table in tables] == [12 if one else None for one in large]
    first = chosen(model, settings, tables)
    assert first.plain is not None
    plain = QuantConfig.from_dict(first.plain["config"])
    exact = exact_tables(context(tmp_path), model, first, tables, settings, tmp_path / "tables")
    for choice, sampled, found, whole, one in zip(first.choices, tables, exact, full, large, strict=True):
        if not one:
            assert found is sampled
            np.testing.assert_allclose(found.errors, whole.errors, rtol=1e-6)
            continue
        picked = {(choice.config, choice.rank), (plain, 0)}
        places = [(sampled.configs.index(config), sampled.ranks.index(rank)) for config, rank in picked]
        off = math.exp(
            statistics.mean(math.log(found.errors[place] / sampled.errors[place]) for place in places)
        )
        for at, config in enumerate(sampled.configs):
            for r, rank in enumerate(sampled.ranks):
                if (config, rank) in picked:
                    assert found.errors[at, r] == pytest.approx(whole.errors[at, r], rel=2e-3)
                else:
                    assert found.errors[at, r] == pytest.approx(off * sampled.errors[at, r])
        assert not np.allclose(sampled.errors, whole.errors, rtol=1e-3)
    again = chosen(model, settings, exact, plain=plain)
    assert again.plain is not None
    assert again.plain["config"] == first.plain["config"]
    at = full[0].configs.index(plain)
    assert again.plain["squared_error"] == pytest.approx(sum(t.errors[at, 0] for t in full), rel=1e-4)
    assert first.plain["squared_error"] != pytest.approx(again.plain["squared_error"], rel=1e-4)
    assert not all_exact(first, tables)
    assert all_exact(first, exact)
    for choice, table in zip(again.choices, exact, strict=True):
        entry = table.configs.index(choice.config), table.ranks.index(choice.rank)
        assert choice.expected_cost == table.errors[entry]


@pytest.mark.usefixtures("small")
def test_exact_errors_are_read_back(
    model: ModelInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, tables = built(model, tmp_path)
    first = chosen(model, settings, tables)
    exact = exact_tables(context(tmp_path), model, first, tables, settings, tmp_path / "tables")

    def refuse(*args: object, **given: object) -> ErrorTable:
        raise AssertionError("computed again")

    monkeypatch.setattr(error_tables, "refined", refuse)
    monkeypatch.setattr(error_tables, "error_table", refuse)
    settings, read = built(model, tmp_path)
    again = exact_tables(context(tmp_path), model, first, read, settings, tmp_path / "tables")
    for before, after in ((tables, read), (exact, again)):
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one.errors, other.errors)


@pytest.mark.usefixtures("small", "forked_reopen")
def test_the_verb_chooses_once_more(model: ModelInput, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Line {i} of a text that has no other purpose. " * 20 for i in range(60)))
    common = Common(run=tmp_path / "run", model=str(model.path), data=str(text), dtype="float32", threads=1)
    stage = run_verb("quantize", common, GIVEN, quiet=True)
    settings, tables = built(model, tmp_path)
    first = chosen(model, settings, tables)
    assert first.plain is not None
    plain, expected = QuantConfig.from_dict(first.plain["config"]), first
    turns = 0
    while not all_exact(expected, tables):
        turns += 1
        tables = exact_tables(
            context(tmp_path), model, expected, tables, settings, tmp_path / "tables", turns
        )
        expected = chosen(model, settings, tables, plain=plain)
    assert turns > 0
    found = json.loads((Path(stage["path"]) / "allocation.json").read_text())
    assert found["matrices"] == expected.to_dict()["matrices"]
    assert found["plain_rounding"] == expected.plain
    assert not (Path(stage["path"]) / "tables").exists()
