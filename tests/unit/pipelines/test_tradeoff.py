"""Fused groups in the allocation, and the curve of other budgets."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from compress.model.checkpoint import Checkpoint, checkpoint_architecture
from compress.pipelines.allocate import allocate, problem_of
from compress.pipelines.matrices import Matrix, fused_groups, matrices_of
from compress.pipelines.settings import QuantizeSettings, resolve
from compress.pipelines.tradeoff import STEP, tradeoff
from compress.quantize.error_table import ErrorTable, error_table, menu
from compress.solvers.budget import parse_budget
from compress.solvers.solve import solve
from tests.tiny import tiny_checkpoint
from tests.unit.pipelines.test_allocate import ModelInput

RANKS = (0, 4, 8, 16)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Matrix], list[ErrorTable]]:
    path: Path = tiny_checkpoint("llama_gqa", tmp_path_factory.mktemp("model") / "tiny")
    checkpoint = Checkpoint(path)
    model = ModelInput(
        name="tiny",
        path=path,
        id="0",
        checkpoint=checkpoint,
        architecture=checkpoint_architecture(checkpoint),
    )
    matrices = matrices_of(model)
    tables = [error_table(checkpoint.read(m.tensor), menu("quick"), RANKS, effort="quick") for m in matrices]
    return matrices, tables


def settings(runtime: str) -> QuantizeSettings:
    return resolve(QuantizeSettings, {"objective": "frobenius", "runtime": runtime}, "quick")


def test_fused_groups_are_those_of_one_layer(case: tuple[list[Matrix], list[ErrorTable]]) -> None:
    matrices, _ = case
    groups = [{matrices[member].role for member in group} for group in fused_groups(matrices)]
    assert groups == [{"q", "k", "v"}, {"gate", "up"}] * 2
    for group in fused_groups(matrices):
        assert len({matrices[member].layer for member in group}) == 1


def test_what_is_fused_gets_one_format_and_one_rank(case: tuple[list[Matrix], list[ErrorTable]]) -> None:
    matrices, tables = case
    numel = sum(matrix.numel for matrix in matrices)
    budget = parse_budget("4bit")
    found = {
        runtime: allocate(matrices, tables, budget, 4 * numel, settings(runtime), None)
        for runtime in ("any", "vllm")
    }
    for group in fused_groups(matrices):
        chosen = {
            (found["vllm"].choices[member].config, found["vllm"].choices[member].rank) for member in group
        }
        assert len(chosen) == 1
    assert sum(choice.bits for choice in found["vllm"].choices) <= 4 * numel
    assert found["vllm"].certificate["objective"] >= found["any"].certificate["objective"]


@pytest.mark.parametrize("runtime", ["any", "vllm"])
def test_the_curve_falls_from_the_smallest_to_the_best(
    runtime: str, case: tuple[list[Matrix], list[ErrorTable]]
) -> None:
    matrices, tables = case
    numel = sum(matrix.numel for matrix in matrices)
    curve = tradeoff(matrices, tables, settings(runtime), None)
    points = curve["points"]
    assert curve["cost"] == "squared error of the weights"
    assert len(points) >= 5
    for before, after in itertools.pairwise(points):
        assert after["bits_per_weight"] >= before["bits_per_weight"]
        assert after["cost"] <= before["cost"]
        assert after["bits_per_weight"] - before["bits_per_weight"] < 2 * STEP + 0.1
    problem, _ = problem_of(
        matrices, tables, round(points[2]["bits_per_weight"] * numel), settings(runtime), None
    )
    best = solve(problem).cost
    assert best <= points[2]["cost"] <= 1.2 * best


def test_the_curve_s_bits_are_all_that_is_stored(case: tuple[list[Matrix], list[ErrorTable]]) -> None:
    matrices, tables = case
    curves = {}
    for includes in ("factors", "none"):
        given = {"objective": "frobenius", "budget_includes": includes}
        own = resolve(QuantizeSettings, given, "quick")
        curves[includes] = tradeoff(matrices, tables, own, 4)["points"]
    # With one rank for all, budgets with and without factors ask for the same models.
    assert curves["none"] == curves["factors"]
    found = allocate(matrices, tables, parse_budget("30bit"), 10**9, own, 4)
    assert curves["none"][-1]["bits_per_weight"] == pytest.approx(found.bits_per_weight)
    bare = sum(choice.config.storage_bits(choice.matrix.shape) for choice in found.choices)
    assert bare < sum(choice.bits for choice in found.choices)
