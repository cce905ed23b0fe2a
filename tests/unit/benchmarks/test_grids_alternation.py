"""Turns of rounding and factors: every figure against float64, and the models made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.benchmarks.grids_alternation import VARIANTS, all_variants, alternate, halves, unweighted
from compress.benchmarks.grids_perplexity import approximations, fill
from compress.benchmarks.grids_summary import turns_of
from compress.benchmarks.protocol import Rows
from compress.data.windows import Windows
from compress.quantize.blockwise import quantize_dequantize
from compress.quantize.config import QuantConfig
from compress.quantize.hessian import input_statistics
from tests.tiny import tiny_checkpoint
from tests.unit.benchmarks.test_grids import case, trace_error

CONFIG = QuantConfig(bits=3, block_size=32)
RANK = 4


def best_of_rank(matrix: Tensor, hessian: Tensor, rank: int) -> Tensor:
    """The product of rank ``rank`` nearest to a matrix in the outputs, by a whole SVD in float64."""
    root = torch.linalg.cholesky(hessian)
    u, s, vh = torch.linalg.svd(matrix.double() @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize("first", ["rounding", "factors"])
def test_plain_turns_are_those_of_an_exact_alternation(first: str) -> None:
    weight, hessian, statistics = case()
    held_out, other, _ = case(seed=9)
    del held_out
    found = alternate(
        weight,
        CONFIG,
        statistics,
        input_statistics(other, damping=1e-9),
        rank=RANK,
        how="plain",
        first=first,  # type: ignore[arg-type]
        turns=2,
    )
    norm, wide = trace_error(weight, hessian), weight.double()
    product = best_of_rank(wide, hessian, RANK) if first == "factors" else torch.zeros_like(wide)
    before = None
    for turn in found:
        left = wide - product
        quantized = quantize_dequantize(left.float(), CONFIG).double()
        error = left - quantized
        rounded = trace_error(error, hessian)
        alone = trace_error(error - best_of_rank(error, hessian, RANK), hessian)
        product = best_of_rank(wide - quantized, hessian, RANK)
        fitted = trace_error(wide - quantized - product, hessian)
        # a weight on the border of two entries may fall the other way, hence the tolerances
        assert turn.rounded == pytest.approx(rounded / norm, rel=0.02)
        assert turn.fitted == pytest.approx(fitted / norm, rel=0.02)
        assert turn.could_take == pytest.approx(1 - alone / rounded, rel=0.03)
        assert turn.taken == pytest.approx(1 - fitted / rounded, rel=0.05)
        ours = trace_error(wide - quantized - product, other) / trace_error(wide, other)
        assert turn.held_out == pytest.approx(ours, rel=0.03)
        blocks = left.reshape(-1, 32).abs().amax(1).mean() / wide.reshape(-1, 32).abs().amax(1).mean()
        assert turn.range == pytest.approx(float(blocks), rel=1e-3)
        if before is None:
            assert turn.overlap is None
        else:
            cross = float(torch.trace(error @ hessian @ before.T))
            cosine = cross / (rounded * trace_error(before, hessian)) ** 0.5
            assert turn.overlap == pytest.approx(cosine, abs=0.02)
        before = error


def test_descent_goes_down_with_every_half_of_a_turn() -> None:
    weight, hessian, statistics = case()
    turns = halves(weight, CONFIG, statistics, rank=RANK, how="descent", first="rounding")
    last = float("inf")
    for _ in range(4):
        left, values, product = next(turns)
        rounded = trace_error(left - values, hessian)
        fitted = trace_error(weight - values - product, hessian)
        assert fitted <= rounded * (1 + 1e-4)
        assert rounded <= last * (1 + 1e-4)
        last = fitted


def test_without_inputs_errors_are_those_of_the_weights() -> None:
    weight, _, _ = case()
    error = weight - quantize_dequantize(weight, CONFIG)
    assert unweighted(96).output_error(error) == pytest.approx(float(error.double().square().sum()), rel=1e-5)


def test_means_of_turns_are_relative_to_one_pass() -> None:
    weight, _, statistics = case()
    rows = {
        str(scale): {
            "alternation": {"NF3": all_variants(scale * weight, CONFIG, statistics, statistics, RANK, 2)}
        }
        for scale in (1, 2)
    }
    assert set(rows["1"]["alternation"]["NF3"]) == set(VARIANTS)
    found = turns_of(rows, "NF3", "plain, rounding first", "plain, rounding first")
    assert found["turn 1"]["fitted"] == pytest.approx(1)
    one = rows["1"]["alternation"]["NF3"]["plain, rounding first"]
    assert found["turn 2"]["rounded"] == pytest.approx(one[1]["rounded"] / one[0]["fitted"], rel=1e-3)  # type: ignore[operator]
    assert "overlap" not in found["turn 1"]
    start = turns_of(rows, "NF3", "plain, factors first", "plain, rounding first")["turn 1"]["fitted"]
    factors = rows["1"]["alternation"]["NF3"]["plain, factors first"]
    assert start == pytest.approx(factors[0]["fitted"] / one[0]["fitted"], rel=1e-3)  # type: ignore[operator]


def test_what_stands_for_a_matrix_ends_in_factors_unless_it_says_so() -> None:
    weight, hessian, statistics = case(rows=64, columns=96)
    found = approximations(weight, statistics)
    errors = {name: trace_error(weight - values, hessian) for name, values in found.items()}
    for first in ("rounding", "factors"):
        assert (
            errors[f"{first} first, 3 turns"] < errors[f"{first} first, 3 turns, factors of the turn before"]
        )
    assert len(found) == 7


def test_models_are_scored_once(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama_gqa", tmp_path / "tiny")
    ids = torch.randint(4, 128, (4, 32), generator=torch.Generator().manual_seed(3))
    rows = Rows(tmp_path / "out.json", {"benchmark": "grids perplexity"})
    test = Windows(ids=ids[:2], labels=ids[:2].clone(), protocol={"text": "made up"})
    said: list[str] = []
    fill(path, rows, ids, test, said.append)
    found = rows.rows
    assert len(found) == 8
    assert all(row["mean_output_error"] > 0 for name, row in found.items() if name != "dense")
    fill(path, rows, ids, test, said.append)
    assert rows.rows == found
