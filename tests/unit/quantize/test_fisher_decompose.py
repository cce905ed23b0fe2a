"""Fisher-weighted decomposition against float64 references, and the paper's algorithm written out again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError, UsageError
from compress.quantize.blockwise import quantize_blockwise, quantize_dequantize
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import decompose
from compress.quantize.fisher import Fisher
from compress.quantize.fisher_decompose import decompose_fisher, lq_lora, weighted_factors
from tests.unit.quantize.test_decompose import squared, trained
from tests.unit.quantize.test_fisher import information, weighted

CONFIG = QuantConfig(bits=3, block_size=32)
SHAPE = (96, 160)


def fisher_of(shape: tuple[int, int] = SHAPE, seed: int = 0, *, noise: float = 1.0) -> Fisher:
    return Fisher.of(information(shape, seed, noise=noise), examples=4)


def alternating_least_squares(matrix: Tensor, full: Tensor, rank: int, rounds: int = 200) -> float:
    """Least ``sum F (M - L R)^2`` by solving for the rows of L and the columns of R in turns, float64."""
    left = torch.randn(matrix.shape[0], rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = torch.zeros(rank, matrix.shape[1], dtype=torch.float64)
    root = full.sqrt()
    for _ in range(rounds):
        right = torch.linalg.lstsq(root.T[..., None] * left, (root * matrix).T[..., None]).solution[..., 0].T
        left = torch.linalg.lstsq(root[..., None] * right.T, (root * matrix)[..., None]).solution[..., 0]
    return weighted(full, matrix - left @ right)


@pytest.mark.parametrize("rank", [1, 3])
def test_factors_are_the_best_there_are_where_the_information_has_rank_one(rank: int) -> None:
    matrix = torch.randn(14, 18, generator=torch.Generator().manual_seed(0))
    full = information((14, 18), noise=0.0, skew=0.5)
    fisher = Fisher.of(full, examples=1)
    left, right = weighted_factors(matrix, rank, fisher, seed=0)
    found = weighted(full, matrix - left @ right)
    roots = full.double().sum(1).sqrt(), full.double().sum(0).sqrt()
    scaled = roots[0][:, None] * matrix.double() * roots[1]
    tail = float(torch.linalg.svdvals(scaled)[rank:].square().sum() / full.double().sum())
    assert found == pytest.approx(tail, rel=1e-4)
    assert found == pytest.approx(alternating_least_squares(matrix.double(), full.double(), rank), rel=1e-3)


@given(shape=st.tuples(st.integers(4, 30), st.integers(4, 30)), seed=st.integers(0, 500), zeros=st.booleans())
def test_factors_minimise_the_two_sided_error(shape: tuple[int, int], seed: int, zeros: bool) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    full = information(shape, seed)
    if zeros:
        full[seed % shape[0]], full[:, seed % shape[1]] = 0, 0
    fisher = Fisher.of(full, examples=1).summed()
    left, right = weighted_factors(matrix, 2, fisher, seed=seed)
    assert bool(left.isfinite().all() & right.isfinite().all())
    roots = full.double().sum(1).sqrt(), full.double().sum(0).sqrt()
    scaled = roots[0][:, None] * matrix.double() * roots[1]
    tail = float(torch.linalg.svdvals(scaled)[2:].square().sum() / full.double().sum())
    norm = fisher.cost(matrix)
    assert fisher.cost(matrix - left @ right) == pytest.approx(tail, rel=1e-3, abs=1e-5 * norm)


def test_leading_factors_are_those_of_a_smaller_rank() -> None:
    weight, fisher = trained((14, 40)), fisher_of((14, 40))
    large, small = (weighted_factors(weight, rank, fisher, seed=0) for rank in (9, 4))
    torch.testing.assert_close(large[0][:, :4] @ large[1][:4], small[0] @ small[1])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("factor_config", [FACTOR_8BIT, None])
@pytest.mark.parametrize("rank", [0, 1, 12])
@pytest.mark.parametrize("whole", [True, False])
def test_errors_are_those_of_the_stored_form(
    bits: int, factor_config: QuantConfig | None, rank: int, whole: bool
) -> None:
    weight, fisher = trained(), fisher_of()
    fisher = fisher if whole else fisher.summed()
    config = QuantConfig(bits=bits, block_size=32)
    ours = decompose_fisher(weight, config, fisher, rank=rank, factor_config=factor_config, iterations=3)
    paper = lq_lora(weight, config, rank, 3, fisher, factor_config=factor_config)
    full = fisher.full
    if full is None:
        full = fisher.rows[:, None].double() * fisher.columns / fisher.columns.double().sum()
    for found in (ours, paper):
        dense = found.decomposition.quantized.dequantize().double()
        if (factors := found.decomposition.factors()) is not None:
            assert (factors[0].shape, factors[1].shape) == ((96, rank), (rank, 160))
            dense += factors[0].double() @ factors[1].double()
        assert found.decomposition.rank == rank
        assert found.weighted_error == pytest.approx(weighted(full, weight - dense), rel=1e-3)
        assert found.decomposition.error == pytest.approx(squared(weight - dense), rel=1e-3)
        assert found.weighted_norm == pytest.approx(weighted(full, weight), rel=1e-5)
        assert len(found.iterates) == len(found.decomposition.iterates)


def test_rank_zero_is_plain_rounding() -> None:
    weight, fisher = trained(), fisher_of()
    plain = quantize_blockwise(weight, CONFIG)
    for found in (decompose_fisher(weight, CONFIG, fisher, rank=0), lq_lora(weight, CONFIG, 0, 5, fisher)):
        assert torch.equal(found.decomposition.quantized.codes, plain.codes)
        assert found.decomposition.factors() is None
        assert found.iterates == (found.weighted_error,)


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 12), bits=st.sampled_from([2, 3]))
def test_the_best_iterate_is_kept(seed: int, rank: int, bits: int) -> None:
    weight, fisher = trained((40, 48), seed), fisher_of((40, 48), seed)
    config = QuantConfig(bits=bits, block_size=16)
    found = decompose_fisher(weight, config, fisher, rank=rank, iterations=12, seed=seed)
    assert found.weighted_error == pytest.approx(min(found.iterates), rel=1e-5)
    assert len(found.iterates) % 2 == 0
    if len(found.iterates) < 24:  # it stopped because neither half of the last round was better
        assert min(found.iterates[-2:]) >= min(found.iterates[:-2])
    paper = lq_lora(weight, config, rank, 40, fisher, seed=seed)
    best = min(range(len(paper.iterates)), key=paper.iterates.__getitem__)
    assert best >= len(paper.iterates) - 2
    assert paper.weighted_error == pytest.approx(paper.iterates[best], rel=0.02)  # 16-bit factors


def test_the_papers_algorithm_written_out_again() -> None:
    """Exact SVDs and no kernels; rank + 10 is no smaller than the matrix, so nothing is randomized."""
    weight = trained((24, 40))
    config = QuantConfig(bits=2, block_size=8)
    information_OI = information((24, 40), skew=0.4)
    for full in (None, information_OI):
        ones = torch.ones(24, 40, dtype=torch.float64)
        weights = ones if full is None else full.double()
        rows, columns = weights.mean(1, keepdim=True).sqrt(), weights.mean(0).sqrt()
        quantized, errors = torch.zeros(24, 40, dtype=torch.float64), []
        kept: Tensor | None = None
        for _ in range(100):
            u, s, vh = torch.linalg.svd(rows * (weight - quantized) * columns, full_matrices=False)
            product = (u[:, :16] * s[:16] @ vh[:16]) / rows / columns
            quantized = quantize_dequantize((weight - product).float(), config).double()
            error = weighted(weights, weight - product - quantized)
            if errors and error >= min(errors):
                errors.append(error)
                break
            errors.append(error)
            kept = quantized
        assert len(errors) > 3
        assert kept is not None
        fisher = None if full is None else Fisher.of(full, examples=1)
        found = lq_lora(weight, config, 16, 100, fisher)
        torch.testing.assert_close(found.iterates[:3], tuple(errors[:3]), rtol=0.02, atol=0.0)
        assert min(found.iterates) == pytest.approx(min(errors), rel=0.1)
        one = lq_lora(weight, config, 16, 1, fisher).decomposition.quantized.dequantize()
        first = torch.linalg.svd(rows * weight * columns, full_matrices=False)
        product = (first.U[:, :16] * first.S[:16] @ first.Vh[:16]) / rows / columns
        same = (one - quantize_dequantize((weight - product).float(), config)).abs() < 1e-5
        assert float(same.float().mean()) > 0.995


def test_without_information_the_errors_are_frobenius_norms() -> None:
    found = lq_lora(trained(), CONFIG, 8, 10)
    assert found.weighted_error == pytest.approx(found.decomposition.error, rel=1e-5)
    assert found.iterates == pytest.approx(found.decomposition.iterates, rel=1e-5)
    assert found.weighted_norm == pytest.approx(found.decomposition.weight_norm, rel=1e-5)
    assert isinstance(found.decomposition.factor_out, Tensor)
    assert found.decomposition.factor_out.dtype == torch.float16


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_weighing_pays_where_weights_differ_and_costs_frobenius(bits: int, noise: float) -> None:
    weight, fisher = trained(), fisher_of(noise=noise)
    config = QuantConfig(bits=bits, block_size=32)
    ours = decompose_fisher(weight, config, fisher, rank=12)
    plain = decompose(weight, config, rank=12)
    assert ours.weighted_error < 0.9 * fisher.cost(weight - plain.dequantize())
    assert ours.decomposition.error > plain.error
    assert ours.weighted_error < 0.9 * fisher.cost(weight - quantize_dequantize(weight, config))


def test_more_iterations_never_give_a_worse_result() -> None:
    weight, fisher = trained(), fisher_of()
    ours = [
        decompose_fisher(weight, CONFIG, fisher, rank=8, iterations=n).weighted_error for n in range(1, 7)
    ]
    paper = [min(lq_lora(weight, CONFIG, 8, n, fisher).iterates) for n in range(1, 7)]
    for errors in (ours, paper):
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.95 * errors[0]


def test_a_seed_gives_one_answer_and_low_precision_is_computed_in_float32() -> None:
    weight, fisher = trained().bfloat16(), fisher_of()
    for run in (
        lambda w, seed: decompose_fisher(w, CONFIG, fisher, rank=6, iterations=3, seed=seed),
        lambda w, seed: lq_lora(w, CONFIG, 6, 3, fisher, seed=seed),
    ):
        first, again, other = run(weight, 5), run(weight.float(), 5), run(weight, 6)
        assert torch.equal(first.decomposition.dequantize(), again.decomposition.dequantize())
        assert first.iterates == again.iterates != other.iterates


def test_weights_that_do_not_matter_and_weights_that_are_zero() -> None:
    weight = trained((40, 64))
    for found in (
        decompose_fisher(weight, CONFIG, Fisher.of(torch.zeros(40, 64), examples=1), rank=4),
        decompose_fisher(torch.zeros(40, 64), CONFIG, fisher_of((40, 64)), rank=4),
    ):
        assert found.weighted_error == 0.0
        assert bool(found.decomposition.dequantize().isfinite().all())
    assert found.decomposition.error == 0.0


def test_impossible_requests_are_refused() -> None:
    weight, fisher = trained((40, 64)), fisher_of((40, 64))
    for rank in (41, -1):
        with pytest.raises(UsageError, match="1 to 40"):
            decompose_fisher(weight, CONFIG, fisher, rank=rank)
        with pytest.raises(UsageError, match="1 to 40"):
            lq_lora(weight, CONFIG, rank, 3)
    with pytest.raises(UsageError, match="at least one"):
        decompose_fisher(weight, CONFIG, fisher, rank=0, iterations=0)
    with pytest.raises(UsageError, match="at least one"):
        lq_lora(weight, CONFIG, 0, 0)
    with pytest.raises(UsageError, match="cannot weigh"):
        decompose_fisher(weight, CONFIG, fisher_of((64, 40)), rank=0)
    weight[0, 0] = torch.inf
    with pytest.raises(CompressError, match="not finite"):
        lq_lora(weight, CONFIG, 3, 3)
