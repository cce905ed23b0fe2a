"""LQ decomposition: errors are what they say, the best iterate is kept, alternation pays."""

from __future__ import annotations

import pytest
import torch

from compress.errors import UsageError
from compress.quantize.blockwise import quantize_blockwise, quantize_dequantize
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import decompose, factor_bits
from compress.quantize.lowrank import low_rank_factors

CONFIG = QuantConfig(bits=3, block_size=32)


def trained(shape: tuple[int, int] = (96, 160), seed: int = 0) -> torch.Tensor:
    """Noise plus a decaying spectrum plus outlying columns: what trained matrices look like."""
    generator = torch.Generator().manual_seed(seed)
    size = min(shape)
    left = torch.randn(shape[0], size, generator=generator) * torch.logspace(0, -1.5, size)
    weight = left @ torch.randn(size, shape[1], generator=generator) / size
    weight += 0.05 * torch.randn(shape, generator=generator)
    weight[:, ::37] *= 4
    return weight


def squared(matrix: torch.Tensor) -> float:
    return matrix.double().square().sum().item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("factor_config", [FACTOR_8BIT, None])
@pytest.mark.parametrize("rank", [0, 1, 12])
def test_the_error_is_that_of_the_stored_form(
    bits: int, factor_config: QuantConfig | None, rank: int
) -> None:
    weight = trained()
    config = QuantConfig(bits=bits, block_size=32)
    result = decompose(weight, config, rank=rank, factor_config=factor_config, iterations=4)
    dense = result.quantized.dequantize().double()
    if (factors := result.factors()) is not None:
        assert (factors[0].shape, factors[1].shape) == ((96, rank), (rank, 160))
        dense += factors[0].double() @ factors[1].double()
    assert result.error == pytest.approx(squared(weight - dense), rel=1e-3)
    assert result.weight_norm == pytest.approx(squared(weight), rel=1e-6)
    torch.testing.assert_close(result.dequantize().double(), dense, rtol=0, atol=1e-5)
    assert result.storage_bits == config.storage_bits((96, 160)) + factor_bits((96, 160), rank, factor_config)


def test_factors_cost_what_is_stored() -> None:
    assert factor_bits((96, 160), 0, FACTOR_8BIT) == 0
    assert factor_bits((96, 160), 5, None) == 16 * 5 * (96 + 160)
    expected = FACTOR_8BIT.storage_bits((5, 96)) + FACTOR_8BIT.storage_bits((5, 160))
    assert factor_bits((96, 160), 5, FACTOR_8BIT) == expected
    assert expected > 8 * 5 * (96 + 160)


def test_rank_zero_is_plain_rounding() -> None:
    weight = trained()
    plain = quantize_blockwise(weight, CONFIG)
    result = decompose(weight, CONFIG, rank=0)
    assert result.factors() is None
    assert torch.equal(result.quantized.codes, plain.codes)
    assert result.error == pytest.approx(squared(weight - plain.dequantize()), rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_alternation_beats_rounding_with_the_same_rank_in_either_order(bits: int) -> None:
    weight = trained()
    config = QuantConfig(bits=bits, block_size=32)
    alternated = decompose(weight, config, rank=12).error
    left, right = low_rank_factors(weight, 12, seed=0)
    factors_first = squared(weight - left @ right - quantize_dequantize(weight - left @ right, config))
    rest = weight - quantize_dequantize(weight, config)
    left, right = low_rank_factors(rest, 12, seed=0)
    rounding_first = squared(rest - left @ right)
    assert alternated < 0.95 * min(factors_first, rounding_first)
    assert min(factors_first, rounding_first) < 0.95 * squared(rest)


def test_more_iterations_never_give_a_worse_result() -> None:
    weight = trained()
    errors = [
        min(decompose(weight, CONFIG, rank=8, factor_config=None, iterations=n).iterates) for n in range(1, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_the_best_iterate_is_kept_when_the_error_rises() -> None:
    for seed in range(8):
        weight = trained((40, 48), seed)
        result = decompose(
            weight, QuantConfig(bits=2, block_size=16), rank=16, factor_config=None, iterations=30
        )
        if result.iterates[-1] > min(result.iterates):
            break
    else:
        pytest.fail("no seed made the error rise")
    # 16-bit factors lose next to nothing, so the stored error is that of the best iterate, not of the last.
    assert result.error == pytest.approx(min(result.iterates), rel=0.01)
    assert result.error < result.iterates[-1]
    assert len(result.iterates) < 60


def test_each_refit_of_the_factors_lowers_the_error() -> None:
    iterates = decompose(trained(), CONFIG, rank=8).iterates
    for rounded, fitted in zip(iterates[::2], iterates[1::2], strict=True):
        assert fitted < rounded


def test_a_matrix_of_the_asked_rank_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 6, generator=generator) @ torch.randn(6, 160, generator=generator)
    dense = decompose(weight, CONFIG, rank=6, factor_config=None)
    assert dense.error < 1e-6 * dense.weight_norm
    stored = decompose(weight, CONFIG, rank=6)
    assert stored.error < 1e-5 * stored.weight_norm
    assert decompose(weight, CONFIG, rank=0).error > 1e-3 * stored.weight_norm


def test_full_rank_factors_take_everything() -> None:
    weight = trained((24, 40))
    assert decompose(weight, CONFIG, rank=24, factor_config=None).error < 1e-6 * squared(weight)


def test_a_seed_gives_one_answer() -> None:
    first, again, other = (decompose(trained(), CONFIG, rank=8, iterations=3, seed=s) for s in (5, 5, 6))
    assert torch.equal(first.quantized.codes, again.quantized.codes)
    assert torch.equal(first.dequantize(), again.dequantize())
    assert first.error == again.error != other.error


def test_zero_matrices_decompose_to_zero() -> None:
    result = decompose(torch.zeros(40, 64), CONFIG, rank=4)
    assert (result.error, result.weight_norm) == (0.0, 0.0)
    assert torch.equal(result.dequantize(), torch.zeros(40, 64))


def test_bfloat16_weights_are_decomposed_in_float32() -> None:
    weight = trained().bfloat16()
    assert decompose(weight, CONFIG, rank=4, iterations=2).error == pytest.approx(
        decompose(weight.float(), CONFIG, rank=4, iterations=2).error, rel=1e-9
    )


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(UsageError, match="1 to 96"):
        decompose(trained(), CONFIG, rank=97)
    with pytest.raises(UsageError, match="1 to 96"):
        decompose(trained(), CONFIG, rank=-1)
    with pytest.raises(UsageError, match="at least one"):
        decompose(trained(), CONFIG, rank=1, iterations=0)
