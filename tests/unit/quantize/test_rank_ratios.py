"""What further rounds of a decomposition leave: each piece against what is measured directly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.quantize.blockwise import quantize_dequantize
from compress.quantize.config import FACTOR_8BIT, QuantConfig
from compress.quantize.decompose import read_factor, store_factor
from compress.quantize.rank_ratios import mean_shares, noise_shares, refitted_shares, storage_error
from compress.quantize.rounding_errors import rounding_errors
from tests.unit.quantize.test_decompose import squared, trained


def noise(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_factors_take_the_leading_singular_values_of_the_error() -> None:
    rest = noise(90, 120)
    error = rest - quantize_dequantize(rest, QuantConfig(bits=4))
    energy = torch.linalg.svdvals(error.double()).square()
    expected = [energy[:rank].sum() / energy.sum() for rank in (0, 4, 30)]
    np.testing.assert_allclose(noise_shares(rest, (0, 4, 30), 0), expected, rtol=0.1, atol=1e-12)
    assert not noise_shares(torch.zeros(8, 64), (0, 2), 0).any()


def test_the_means_of_rows_are_what_two_bits_lose_in_common() -> None:
    rest = noise(200, 256) * torch.linspace(0.2, 2, 200)[:, None]
    configs = [QuantConfig(bits=bits, block_size=size) for bits in (2, 3, 4) for size in (16, 64)]
    found = mean_shares(rest, configs)
    for config, share in zip(configs, found, strict=True):
        error = (rest - quantize_dequantize(rest, config)).double()
        means = error.mean(1, keepdim=True).expand_as(error).square().sum() / error.square().sum()
        assert share == pytest.approx(float(means) - 1 / 256, abs=5e-4)
    assert (
        found[1] > found[0] > 0.01
    )  # the wider the blocks, the more weights fall between the same two entries
    assert found[2:].max() < 0.01
    assert not mean_shares(torch.zeros(8, 64), configs).any()


def test_one_refit_takes_what_is_said_at_least() -> None:
    """Rounding, then the best factors for what it left: the first of the rounds that are estimated."""
    weight = trained((160, 256))
    configs = [QuantConfig(bits=bits, block_size=size) for bits in (2, 3, 4) for size in (16, 64)]
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    rest = weight - ((u[:, :4] * s[:4]) @ vh[:4]).float()
    first = rounding_errors(rest, configs)
    said = refitted_shares(
        first, squared(rest), noise_shares(rest, (4,), 0)[0], mean_shares(rest, configs), configs
    )
    for config, share, error in zip(configs, said, first, strict=True):
        left = weight.double() - quantize_dequantize(rest, config).double()
        refit = torch.linalg.svdvals(left)[4:].square().sum().item() / error
        assert refit - 0.1 < share < 1, config


def test_shares_stay_shares() -> None:
    configs = [QuantConfig(bits=2), QuantConfig(bits=2, scale_bits=2), QuantConfig(bits=4)]
    first = np.array([1.0, 2.0, 0.0])
    for taken, means in ((0.0, 0.0), (0.5, 0.1), (1.0, 1.0)):
        left = refitted_shares(first, 10.0, taken, np.full(3, means), configs)
        assert ((left >= 0) & (left <= 1)).all()
        assert left[1] >= left[0]  # what the coarse scales add is harder to take
    np.testing.assert_array_equal(refitted_shares(np.zeros(3), 0.0, 0.3, np.zeros(3), configs) <= 1, True)


def test_the_storage_of_factors_is_found_from_small_products() -> None:
    left, right = noise(70, 5, 3), noise(5, 90, 4)
    for config in (None, FACTOR_8BIT, QuantConfig(bits=2)):
        stored = [read_factor(store_factor(f.contiguous(), config)) for f in (left.T, right)]
        expected = squared(left.double() @ right.double() - stored[0].T.double() @ stored[1].double())
        assert storage_error(left, right, config) == pytest.approx(expected, rel=1e-6)
