"""Errors of stored matrices, against sums written out and against what the decompositions say of themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import CompressError
from compress.quantize.blockwise import quantize_blockwise
from compress.quantize.config import QuantConfig
from compress.quantize.fisher import Fisher
from compress.quantize.fisher_decompose import decompose_fisher
from compress.quantize.hessian import DAMPING, input_statistics
from compress.quantize.linear import LQLinear
from compress.quantize.output_aware import decompose_outputs
from compress.quantize.stored_errors import (
    least_damping,
    output_error,
    rounding_error,
    stored_error,
    weighted_error,
)

CONFIG = QuantConfig(bits=3, scale_bits=4, block_size=16, group_size=16)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_output_error_is_that_of_the_outputs_and_the_damping() -> None:
    error_OI, inputs_IT = drawn(700, 20), drawn(20, 90, seed=1)  # more rows than are multiplied at once
    gram_II = inputs_IT @ inputs_IT.T / 90
    outputs = float((error_OI @ inputs_IT).square().sum()) / 90
    assert output_error(error_OI, gram_II, 0.0) == pytest.approx(outputs, rel=1e-12)
    added = 0.3 * float(gram_II.trace()) / 20 * float(error_OI.square().sum())
    assert output_error(error_OI, gram_II, 0.3) == pytest.approx(outputs + added, rel=1e-12)
    squares = float(error_OI.square().sum())
    assert output_error(error_OI, torch.zeros_like(gram_II), DAMPING) == pytest.approx(squares, rel=1e-12)


def test_damping_grows_until_the_moment_is_positive() -> None:
    inputs_IT = drawn(12, 40, seed=2)
    gram_II = inputs_IT @ inputs_IT.T
    assert least_damping(gram_II) == DAMPING
    assert least_damping(torch.zeros_like(gram_II)) == DAMPING
    mean = float(gram_II.trace()) / 12
    values, vectors = torch.linalg.eigh(gram_II)
    values[0] = -0.05 * mean  # between a hundredth and a tenth of the mean
    spoilt = vectors @ values.diag() @ vectors.T
    for gram in (gram_II, torch.zeros_like(gram_II), spoilt):
        assert least_damping(gram) == pytest.approx(input_statistics(gram).damping)
    assert least_damping(spoilt) == pytest.approx(10 * DAMPING)
    with pytest.raises(CompressError, match="not positive"):
        least_damping(torch.tensor([-100.0, 160.0, *[1.0] * 10], dtype=torch.float64).diag())


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("factors", [None, QuantConfig(bits=8, scale_bits=8, block_size=16, group_size=16)])
def test_they_are_what_decompositions_say_of_themselves(rank: int, factors: QuantConfig | None) -> None:
    weight_OI, inputs_IT = drawn(24, 48, seed=3).float(), drawn(48, 200, seed=4)
    gram_II = inputs_IT @ inputs_IT.T / 200
    statistics = input_statistics(gram_II)
    aware = decompose_outputs(weight_OI, CONFIG, statistics, rank=rank, factor_config=factors)
    error_OI = stored_error(weight_OI, LQLinear.from_decomposition(aware.decomposition))
    wanted = weight_OI.double() - aware.decomposition.dequantize().double()
    torch.testing.assert_close(error_OI, wanted, rtol=0, atol=1e-6)
    assert output_error(error_OI, gram_II, least_damping(gram_II)) == pytest.approx(
        aware.output_error, rel=1e-5
    )
    assert output_error(weight_OI.double(), gram_II, DAMPING) == pytest.approx(aware.output_norm, rel=1e-5)
    fisher = Fisher.of(drawn(24, 48, seed=5).square(), examples=1)
    assert fisher.full is not None
    other = decompose_fisher(weight_OI, CONFIG, fisher, rank=rank, factor_config=factors)
    error_OI = stored_error(weight_OI, LQLinear.from_decomposition(other.decomposition))
    assert weighted_error(error_OI, fisher.full) == pytest.approx(other.weighted_error, rel=1e-5)
    by_hand = sum(
        float(f) * float(e) ** 2 for f, e in zip(fisher.full.flatten(), error_OI.flatten(), strict=True)
    )
    assert weighted_error(error_OI, fisher.full) == pytest.approx(by_hand, rel=1e-12)


def test_plain_rounding() -> None:
    weight_OI = drawn(10, 37, seed=6).float()
    rounded = quantize_blockwise(weight_OI, CONFIG).dequantize()
    by_hand = sum(
        (float(a) - float(b)) ** 2 for a, b in zip(weight_OI.flatten(), rounded.flatten(), strict=True)
    )
    assert rounding_error(weight_OI, CONFIG) == pytest.approx(by_hand, rel=1e-12)
    with pytest.raises(CompressError):
        rounding_error(torch.full((4, 16), float("nan")), CONFIG)
