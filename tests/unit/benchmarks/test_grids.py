"""Families of grids against float64 references, and what is read off their errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.benchmarks.grids import layers_of, menu_of, row_of
from compress.benchmarks.grids_affine import affine_ranges, improved_steps, refine_affine, round_affine
from compress.benchmarks.grids_inputs import (
    SOURCE_BLOCK,
    SOURCE_STEPS,
    known_moments,
    off_the_grid,
    source_steps,
    weights_of,
)
from compress.benchmarks.grids_rounding import FAMILIES, measured
from compress.benchmarks.grids_summary import (
    at_bits,
    families_at,
    geometric_mean,
    matrix_at_bits,
    report,
    rounded,
    summarize,
)
from compress.benchmarks.protocol import Rows
from compress.errors import UsageError
from compress.model.load import load_model
from compress.quantize.blockwise import compress_scales
from compress.quantize.config import QuantConfig
from compress.quantize.hessian import InputStatistics, input_statistics
from compress.quantize.output_aware import decompose_outputs
from compress.quantize.packing import pack
from compress.quantize.rounding import RANGES
from tests.tiny import tiny_checkpoint

DAMPING = 0.01


def gram_of(columns: int, seed: int) -> Tensor:
    """Second moments of correlated inputs of very different strength, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns // 2, generator=generator, dtype=torch.float64)
    inputs = mix @ torch.randn(columns // 2, 300, generator=generator, dtype=torch.float64)
    inputs += 0.3 * torch.randn(columns, 300, generator=generator, dtype=torch.float64)
    inputs *= torch.logspace(-1, 1, columns, dtype=torch.float64)[
        torch.randperm(columns, generator=generator), None
    ]
    return inputs @ inputs.T / 300


def damped(gram: Tensor) -> Tensor:
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def case(rows: int = 20, columns: int = 96, seed: int = 0) -> tuple[Tensor, Tensor, InputStatistics]:
    """A skewed weight, its damped second moments in float64, and the statistics."""
    gram = gram_of(columns, seed)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) + 0.4
    return weight, damped(gram), input_statistics(gram, damping=DAMPING)


def trace_error(error: Tensor, hessian: Tensor) -> float:
    return float(torch.trace(error.double() @ hessian @ error.double().T))


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_are_traces_in_float64_and_descent_never_raises_them(family: str, bits: int) -> None:
    weight, hessian, statistics = case(seed=bits)
    other = gram_of(96, 50)
    config = QuantConfig(bits=bits, block_size=32)
    found = measured(weight, config, statistics, input_statistics(other), FAMILIES[family], 4)
    first = FAMILIES[family].round(weight, config, statistics)
    second = FAMILIES[family].refine(weight, first, statistics)
    norm = trace_error(weight, hessian)
    assert found["feedback"] == pytest.approx(trace_error(weight - first.values(), hessian) / norm, rel=1e-3)
    assert found["descent"] == pytest.approx(trace_error(weight - second.values(), hessian) / norm, rel=1e-3)
    held_out = trace_error(weight - second.values(), damped(other)) / trace_error(weight, damped(other))
    assert found["descent_held_out"] == pytest.approx(held_out, rel=1e-3)
    assert found["corrected"] < found["descent"] <= found["feedback"]
    plain = weight - FAMILIES[family].round(weight, config, input_statistics(torch.eye(96).double())).values()
    assert found["feedback"] < trace_error(plain, hessian) / norm


@pytest.mark.parametrize("family", ["NormalFloat", "learned"])
def test_tables_are_what_the_package_makes_of_them(family: str) -> None:
    weight, _, statistics = case()
    config = QuantConfig(bits=3, block_size=32, codebook="learned" if family == "learned" else "normal")
    found = measured(weight, config, statistics, statistics, FAMILIES[family], 4)
    made = decompose_outputs(weight, config, statistics, rank=4)
    assert found["corrected"] == pytest.approx(made.output_error / made.output_norm, rel=1e-5)
    assert FAMILIES[family].bits((20, 96), config) == made.decomposition.quantized.storage_bits


@pytest.mark.parametrize(("bits", "columns"), [(2, 96), (3, 80), (4, 96)])
def test_bits_of_affine_grids_are_those_of_their_packed_parts(bits: int, columns: int) -> None:
    weight, _, statistics = case(columns=columns)
    config = QuantConfig(bits=bits, block_size=32, group_size=16)
    made = round_affine(weight, config, statistics, zero_points=True)
    codes = torch.nn.functional.pad(made.codes, (0, -columns % 32))
    scales = pack(made.scales.codes, 8).numel() + made.scales.maxima.nbytes + made.scales.offset.nbytes
    zeros = pack(made.zeros, bits).numel()
    assert FAMILIES["affine"].bits((20, columns), config) == 8 * (pack(codes, bits).numel() + scales + zeros)
    assert FAMILIES["symmetric"].bits((20, columns), config) == 8 * (pack(codes, bits).numel() + scales)


@pytest.mark.parametrize("zero_points", [True, False])
def test_affine_feedback_is_the_recurrence_with_inverses(zero_points: bool) -> None:
    """Column by column: what a column loses is spread over the later ones by the inverse of what is left of H."""
    weight, hessian, statistics = case(rows=40, columns=64)
    made = round_affine(weight, QuantConfig(bits=3, block_size=16), statistics, zero_points=zero_points)
    order, levels = statistics.order.tolist(), 7
    left, codes = weight.double().clone(), torch.zeros(40, 64, dtype=torch.int64)
    for at, column in enumerate(order):
        step, zero = made.steps[:, column // 16].double(), made.zeros[:, column // 16].double()
        codes[:, column] = (left[:, column] / step + zero).round().clamp(0, levels).long()
        error = left[:, column] - (codes[:, column] - zero) * step
        later = order[at:]
        inverse = torch.linalg.inv(hessian[later][:, later])
        for place, other in enumerate(later):
            left[:, other] -= error * inverse[0, place] / inverse[0, 0]
    assert (
        float((codes == made.codes.long()).double().mean()) > 0.995
    )  # ties in float32 may fall the other way


@pytest.mark.parametrize("zero_points", [True, False])
def test_ranges_are_the_best_of_those_tried(zero_points: bool) -> None:
    weight, _, statistics = case(rows=6, columns=64)
    config = QuantConfig(bits=2, block_size=16)
    steps, zeros = affine_ranges(weight, config, statistics.weights, zero_points=zero_points)

    def cost(block: Tensor, weights: Tensor, step: float, zero: float) -> float:
        codes = (block / step + zero).round().clamp(0, 3)
        return float(((block - (codes - zero) * step).square() * weights).sum())

    better = 0
    for at, block in enumerate(weight.double().reshape(-1, 16)):
        weights = statistics.weights.double().reshape(-1, 16)[at % 4]
        low, high = min(float(block.min()), 0.0), max(float(block.max()), 0.0)
        tried = []
        for share in RANGES:
            if zero_points:
                step = share * (high - low) / 3
                tried.append(cost(block, weights, step, min(max(round(-share * low / step), 0), 3)))
            else:
                tried.append(cost(block, weights, 2 * share * float(block.abs().max()) / 3, 2))
        own = cost(block, weights, float(steps[at]), float(zeros[at]))
        assert own <= min(tried) * (1 + 1e-4)
        better += own < min(tried) * (1 - 1e-3)
    assert (better > 0) == zero_points  # ends that are cut apart


def test_scales_of_single_blocks_are_least_squares() -> None:
    weight, hessian, statistics = case(columns=32)
    made = round_affine(weight, QuantConfig(bits=3, block_size=32), statistics, zero_points=True)
    found = improved_steps(weight, made, statistics.gram)
    for row in range(len(weight)):
        units, wide = made.units()[row].double(), weight[row].double()
        assert float(found[row, 0]) == pytest.approx(
            float((units @ hessian @ wide) / (units @ hessian @ units)), rel=1e-3
        )


def test_a_matrix_on_an_affine_grid_is_where_zero_points_win_and_off_it_they_do_not() -> None:
    """The trap that the benchmark steps around: a checkpoint that was rounded to Q4_1 before."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 4, SOURCE_BLOCK, generator=generator)
    low, high = weight.amin(2, keepdim=True), weight.amax(2, keepdim=True)
    step = (high - low) / SOURCE_STEPS
    on_grid = (((weight - low) / step).round() * step + low).view(64, 128)
    steps = source_steps(on_grid.bfloat16().float())
    assert steps is not None
    torch.testing.assert_close(steps, step.expand_as(weight).reshape(64, 128), rtol=0.03, atol=0)
    moved = off_the_grid(on_grid, steps, 1)
    assert source_steps(moved) is None
    assert float(((moved - on_grid) / steps).abs().max()) <= 0.5 + 1e-5
    assert float(((moved - on_grid) / steps).square().mean()) == pytest.approx(1 / 12, rel=0.05)
    statistics, config = input_statistics(torch.eye(128).double()), QuantConfig(bits=4, block_size=32)

    def ratio(matrix: Tensor) -> float:
        affine, table = (
            measured(matrix, config, statistics, statistics, FAMILIES[name], 0)["descent"]
            for name in ("affine", "NormalFloat")
        )
        return affine / table

    assert ratio(on_grid) < 0.95 * ratio(moved)


def test_equal_bits_are_read_between_two_block_sizes() -> None:
    points = [(2.2, 0.4), (2.6, 0.1), (2.1, 0.8)]
    assert at_bits(points, 2.4) == pytest.approx(0.2)  # half way in bits: the geometric mean
    assert at_bits(points, 2.1) == pytest.approx(0.8)
    assert at_bits(points, 2.7) is None
    assert at_bits(points[:1], 2.2) is None
    assert geometric_mean([1.0, 4.0, 2.0]) == pytest.approx(2.0)


def menu(nf: float, affine: float) -> dict[str, Any]:
    def of(bits: float, error: float) -> dict[str, float]:
        return {"bits": bits, "descent": error}

    return {
        "3 bits, block 32": {
            "NormalFloat": of(3.25, nf),
            "learned": of(3.25, nf),
            "affine": of(3.35, affine),
        },
        "3 bits, block 64": {
            "NormalFloat": of(3.13, nf),
            "learned": of(3.13, nf),
            "affine": of(3.17, affine),
        },
    }


def test_families_compare_over_the_matrices_that_all_of_them_reach() -> None:
    rows = {
        "layer 0": {"menu": menu(0.2, 0.1)},
        "layer 1": {"menu": menu(0.1, 0.2)},
        "layer 2": {"menu": {"3 bits, block 64": menu(1, 1)["3 bits, block 64"]}},
        "layer 3": {"menu": menu(0.1, 0.04)},
    }
    assert matrix_at_bits(rows["layer 0"]["menu"], "affine", "descent", 3.25) == pytest.approx(0.1)
    found = families_at(rows, "menu", "descent", 3.25)
    assert found["matrices"] == 3
    assert found["affine"] == pytest.approx({"error": math.pow(0.4, 1 / 3), "best_on": 2})
    assert (found["best"], found["affine_clearly_best_on"]) == ("affine", 2)
    assert families_at(rows, "menu", "descent", 4.25) == {"matrices": 0}
    assert families_at(rows, "menu", "corrected", 3.25) == {"matrices": 0}


def test_a_matrix_that_lies_on_no_grid_is_left_as_it_is(tmp_path: Path) -> None:
    weight, _, _ = case(
        rows=256, columns=64
    )  # large enough for 3.25 bits: the offset and a maximum take 64 bits
    row = row_of(weight, gram_of(64, 3), gram_of(64, 4), 0, quick=True)
    assert not row["on_grid"]
    assert "menu_on_grid" not in row
    rows = Rows(tmp_path / "grids.json", {"benchmark": "grids"})
    summarize({"layer 0, q": row}, rows)
    menu = row["menu"]
    for family in FAMILIES:
        found = rows.get("layer 0, q")["3.25 bits"][family]
        assert found["rank 0"] == pytest.approx(matrix_at_bits(menu, family, "descent", 3.25), rel=1e-4)
        assert found["rank 8"] == pytest.approx(matrix_at_bits(menu, family, "corrected", 3.25), rel=1e-4)
        assert rows.get("layer 0, q")["4.25 bits"][family] == {}
    text = report(rows.rows)
    assert "at 3.25 bits: NormalFloat 1.000" in text
    assert "turns, NF3, feedback, rounding first, turn 1: " in text
    order = rows.get("order of compress quantize, NF3")
    first = row["alternation"]["NF3"]["feedback, rounding first"][0]
    assert order["fitted"] == pytest.approx(row["output_aware"]["NF3"]["fitted"] / first["fitted"], rel=1e-4)


def test_the_menu_counts_factors_apart() -> None:
    weight, _, statistics = case(rows=32, columns=64)
    found = menu_of(weight, statistics, statistics, {(3, 32): 4, (3, 64): 0}, ("affine",))
    with_factors, without = found["3 bits, block 32"]["affine"], found["3 bits, block 64"]["affine"]
    config = QuantConfig(bits=8)
    expected = (config.storage_bits((4, 32)) + config.storage_bits((4, 64))) / weight.numel()
    assert with_factors["factor_bits"] == pytest.approx(expected)
    assert without["factor_bits"] == 0
    assert "corrected" not in without
    assert with_factors["bits"] == FAMILIES["affine"].bits((32, 64), QuantConfig(bits=3, block_size=32)) / (
        32 * 64
    )


def test_moments_are_those_of_the_inputs_and_are_kept(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama_gqa", tmp_path / "tiny")
    ids = torch.randint(4, 128, (3, 16), generator=torch.Generator().manual_seed(3))
    found = known_moments(path, (1,), ids, tmp_path / "work")
    network: Any = load_model(path, dtype=torch.float32)
    seen: dict[str, Tensor] = {}
    for name, module in network.model.layers[1].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({f"1.{name}": args[0].flatten(0, 1).double()})
            )
    with torch.no_grad():
        network(input_ids=ids)
    assert set(found) == set(seen) == {name for name, _ in weights_of(path, (1,))}
    for name, inputs in seen.items():
        torch.testing.assert_close(found[name], inputs.T @ inputs / 48, rtol=1e-3, atol=1e-6)
    files = list((tmp_path / "work").iterdir())
    known_moments(path, (1,), ids, tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == files
    assert len(files) == 1
    known_moments(path, (1,), ids[:2], tmp_path / "work")
    assert len(list((tmp_path / "work").iterdir())) == 2


def test_layers_are_numbers_the_model_has() -> None:
    assert layers_of("3, 1,3", 4) == [1, 3]
    for wrong in ("4", "-1", "a", ""):
        with pytest.raises(UsageError, match="--layers"):
            layers_of(wrong, 4)


def test_constant_and_zero_blocks_are_valid() -> None:
    weight, _, statistics = case(rows=4, columns=64)
    weight[0], weight[1] = 0.0, 0.5
    config = QuantConfig(bits=3, block_size=32)
    made = refine_affine(weight, round_affine(weight, config, statistics, zero_points=True), statistics)
    assert bool(made.values().isfinite().all())
    assert float(made.values()[0].abs().max()) == 0.0
    again = compress_scales(made.steps.reshape(-1), config).values(config)
    torch.testing.assert_close(again, made.steps.reshape(-1), rtol=0.02, atol=1e-4)


def test_figures_have_six_digits() -> None:
    assert rounded({"a": [0.123456789, 3], "b": "text", "c": True}) == {
        "a": [0.123457, 3],
        "b": "text",
        "c": True,
    }
