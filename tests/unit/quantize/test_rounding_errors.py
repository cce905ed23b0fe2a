"""Rounding errors of a menu: against brute force in float64, for every shape, and from samples without bias."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError, UsageError
from compress.quantize.block_model import BlockModel, relative_errors, typical_units
from compress.quantize.blockwise import compress_scales
from compress.quantize.config import MENU, QuantConfig
from compress.quantize.dominated import finer_twins
from compress.quantize.normal_float import normal_float_table
from compress.quantize.rounding_errors import ScalesOfRows, block_maxima, rounding_errors
from compress.quantize.row_sample import RowSample, sample_rows

SOME = MENU[::31]


def heavy(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, and weights with heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    noise, tails = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    return noise * tails.exp().clamp(max=5) * torch.randn(rows, 1, generator=generator).exp()


def weights_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Weights of squared errors that differ by row, by column and by element; a few are zero."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shapes = ((rows, 1), (columns,), (rows, columns))
    found = sum(torch.randn(shape, generator=generator) for shape in shapes)
    assert isinstance(found, torch.Tensor)
    return found.exp() * (torch.rand(rows, columns, generator=generator) > 0.1)


def brute_force(weight: torch.Tensor, config: QuantConfig, weights: torch.Tensor | None = None) -> float:
    """Block by block, entry by entry, in float64; only what is stored has a narrower type."""
    table = normal_float_table(config.bits).double()
    parts = [row.split(config.block_size) for row in weight]
    absmax = torch.stack([part.abs().max() for row in parts for part in row])
    offset = absmax.min()
    scales = []
    for group in (absmax - offset).split(config.group_size):
        top = group.max().to(config.torch_scale_dtype).float()
        step = top / (2**config.scale_bits - 1)
        codes = (group / step).round().clamp(max=2**config.scale_bits - 1) if step > 0 else group * 0
        scales += (codes * step + offset).double().tolist()
    total = 0.0
    for at, part in enumerate(part for row in parts for part in row):
        error = (part.double()[:, None] - scales[at] * table).abs().min(1).values.square()
        if weights is not None:
            row, block = divmod(at, len(parts[0]))
            start = block * config.block_size
            error = error * weights[row, start : start + len(part)].double()
        total += error.sum().item()
    return total


@given(st.integers(1, 7), st.integers(1, 150), st.integers(0, 10**6), st.integers(0, 18))
def test_any_shape_is_exact(rows: int, columns: int, seed: int, first: int) -> None:
    weight = heavy(rows, columns, seed)
    configs = MENU[first::61]
    expected = [brute_force(weight, config) for config in configs]
    np.testing.assert_allclose(rounding_errors(weight, configs), expected, rtol=1e-4, atol=1e-9)


def test_the_whole_menu_is_exact() -> None:
    weight = heavy(6, 203)
    found = rounding_errors(weight, MENU)
    np.testing.assert_allclose(found[::4], [brute_force(weight, config) for config in MENU[::4]], rtol=5e-5)


def test_sizes_that_do_not_divide_each_other_are_exact() -> None:
    weight = heavy(5, 131)
    configs = [QuantConfig(bits=b, block_size=s, group_size=3) for b in (2, 8) for s in (8, 24, 40, 64, 200)]
    expected = [brute_force(weight, config) for config in configs]
    np.testing.assert_allclose(rounding_errors(weight, configs), expected, rtol=1e-4)


def test_large_matrices_have_coarser_cells_and_are_as_exact() -> None:
    weight = heavy(300, 1000)
    configs = [QuantConfig(bits=bits, block_size=size) for bits in (2, 3, 4, 8) for size in (16, 64)]
    expected = []
    for config in configs:
        scales = compress_scales(
            block_maxima(weight, [config.block_size])[config.block_size].view(-1), config
        )
        units = scales.values(config).view(300, -1).repeat_interleave(config.block_size, 1)[:, :1000].double()
        table = normal_float_table(config.bits).double()
        at = torch.bucketize(weight.double() / units, (table[1:] + table[:-1]) / 2)
        expected.append((weight.double() - table[at] * units).square().sum().item())
    np.testing.assert_allclose(rounding_errors(weight, configs), expected, rtol=1e-5)


@given(st.integers(1, 7), st.integers(1, 150), st.integers(0, 10**6), st.sampled_from([1e-12, 1.0, 1e6]))
def test_weighted_elements_are_exact_for_any_shape(rows: int, columns: int, seed: int, size: float) -> None:
    weight, weights = heavy(rows, columns, seed), size * weights_of(rows, columns, seed)
    configs = MENU[seed % 19 :: 61]
    expected = [brute_force(weight, config, weights) for config in configs]
    found = rounding_errors(weight, configs, element_weights=weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9 * size)


def test_element_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(UsageError, match=r"shape \(7, 9\) cannot weigh"):
        rounding_errors(heavy(9, 7), SOME, element_weights=weights_of(7, 9))


def test_elements_that_count_for_nothing_cost_nothing() -> None:
    weight = heavy(20, 70)
    weights = torch.zeros(20, 70)
    for sample in (None, 5):
        assert not rounding_errors(weight, SOME, element_weights=weights, sample=sample).any()
    weights[3, 41] = 2.0
    expected = [brute_force(weight, config, weights) for config in SOME]
    np.testing.assert_allclose(
        rounding_errors(weight, SOME, element_weights=weights), expected, rtol=1e-3, atol=1e-9
    )


def test_zero_and_constant_blocks() -> None:
    assert not rounding_errors(torch.zeros(6, 70), MENU).any()
    signs = heavy(6, 64).sign()
    assert rounding_errors(0.5 * signs, MENU).max() < 1e-9  # every scale is the offset
    weight = heavy(6, 192)
    weight[1] = 0
    weight[2, :64] = 0.25
    weight[3, 64:128] = 0
    expected = [brute_force(weight, config) for config in SOME]
    np.testing.assert_allclose(rounding_errors(weight, SOME), expected, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-30, 1e15])
def test_extreme_sizes(scale: float) -> None:
    weight = scale * heavy(4, 40)
    weight[0] = 0
    found = rounding_errors(weight, SOME)
    assert np.isfinite(found).all()
    assert (found <= 1.5 * float(weight.double().square().sum()) + 1e-80).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sample", [None, 2])
def test_values_that_are_not_finite_are_refused(value: float, sample: int | None) -> None:
    weight = heavy(8, 40)
    weight[7, 3] = value
    with pytest.raises(CompressError, match="not finite"):
        rounding_errors(weight, SOME, sample=sample)


@given(st.integers(1, 6), st.integers(1, 150), st.lists(st.sampled_from([8, 16, 24, 32, 48, 64]), min_size=1))
def test_maxima_of_wide_blocks_come_from_narrow_ones(rows: int, columns: int, sizes: list[int]) -> None:
    weight = heavy(rows, columns)
    for size, found in block_maxima(weight, sizes).items():
        expected = [[part.abs().max().item() for part in row.split(size)] for row in weight]
        np.testing.assert_array_equal(found.numpy(), np.asarray(expected, dtype=np.float32))


@given(st.integers(2, 40), st.integers(1, 9), st.sampled_from([1, 3, 16, 64, 256]), st.integers(0, 10**6))
def test_scales_of_sampled_rows_are_those_of_the_whole(rows: int, blocks: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    absmax = torch.rand(rows, blocks, generator=generator)
    some = torch.randint(rows, (max(1, rows // 4),), generator=generator).sort().values
    sample = RowSample(rows=some, counts=torch.ones(len(some), dtype=torch.float64))
    for scale_bits in (2, 8):
        config = QuantConfig(bits=2, scale_bits=scale_bits, scale_dtype="float16", group_size=group)
        whole = compress_scales(absmax.view(-1), config).values(config).view(rows, blocks)
        torch.testing.assert_close(ScalesOfRows(absmax, sample)(config), whole[some], rtol=0, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_samples_have_hardly_any_bias(weighted: bool) -> None:
    """From 48 of 120 rows: the mean over 30 seeds lies within 1.5 % and 4 standard errors of the exact error."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(120, 96, generator=generator) * torch.rand(120, 1, generator=generator)
    weight[90:] = 0.02 * weight[90:].sign()  # rows that cost little are drawn seldom and must count for more
    weights = weights_of(120, 96) if weighted else None
    exact = rounding_errors(weight, SOME, element_weights=weights)
    found = np.array(
        [rounding_errors(weight, SOME, element_weights=weights, sample=0.4, seed=seed) for seed in range(30)]
    )
    error = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - exact) < 4 * error + 0.015 * exact).all()
    assert (found.std(0) / exact).max() > 1e-3
    assert (found.std(0) / exact).mean() < 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weighted_samples_estimate_weighted_errors(seed: int) -> None:
    """Rows of whatever weight: samples come closer with the rows drawn, and weights count in them."""
    weight, weights = heavy(240, 96, seed), weights_of(240, 96, seed)
    exact = rounding_errors(weight, SOME, element_weights=weights)
    spread = []
    for sample in (24, 120):
        found = np.array(
            [
                rounding_errors(weight, SOME, element_weights=weights, sample=sample, seed=draw)
                for draw in range(16)
            ]
        )
        spread.append(float(np.sqrt(np.mean((found / exact - 1) ** 2))))
    assert np.abs(np.median(found / exact, axis=0) - 1).max() < 0.15
    assert spread[1] < 0.7 * spread[0]
    assert spread[1] < 0.1


def test_all_rows_are_no_sample_and_seeds_repeat() -> None:
    weight, weights = heavy(30, 80), weights_of(30, 80)
    exact, weighted = rounding_errors(weight, SOME), rounding_errors(weight, SOME, element_weights=weights)
    for sample in (1.0, 30, 1000):
        np.testing.assert_allclose(rounding_errors(weight, SOME, sample=sample), exact, rtol=1e-9)
        found = rounding_errors(weight, SOME, element_weights=weights, sample=sample)
        np.testing.assert_allclose(found, weighted, rtol=1e-9)
    one, same, other = (rounding_errors(weight, SOME, sample=6, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.integers(1, 40), st.integers(0, 10**6))
def test_rows_are_drawn_in_order_and_weighed_by_their_odds(sizes: list[float], count: int, seed: int) -> None:
    found = sample_rows(torch.tensor(sizes), count, seed)
    assert len(found.rows) == min(count, len(sizes))
    assert (found.rows.diff() >= 0).all()
    assert 0 <= int(found.rows.min()) <= int(found.rows.max()) < len(sizes)
    assert (found.counts > 0).all()
    assert (found.counts <= 10.01 * len(sizes) / min(count, len(sizes))).all()


def test_draws_count_every_row_once_on_average() -> None:
    sizes = torch.tensor([0.0, 1.0, 5.0, 0.1, 2.0, 0.0, 30.0])
    totals = torch.zeros(7, dtype=torch.float64)
    for seed in range(4000):
        found = sample_rows(sizes, 3, seed)
        totals.index_add_(0, found.rows, found.counts)
    torch.testing.assert_close(totals / 4000, torch.ones(7, dtype=torch.float64), rtol=0, atol=0.2)


@pytest.mark.parametrize("sample", [0, -3, 0.0, -0.5, 1.5, float("nan")])
def test_samples_that_make_no_sense_are_refused(sample: float) -> None:
    with pytest.raises(UsageError, match="cannot be drawn"):
        sample_rows(torch.ones(9), sample, 0)


def test_what_a_block_is_likely_to_lose_is_what_blocks_like_it_lose() -> None:
    """With blocks that are all alike the model is right, so its correction makes the sample exact."""
    weight = heavy(1, 64).repeat(40, 1) * torch.linspace(0.5, 2, 40)[:, None]
    config = QuantConfig(bits=4, scale_bits=2, group_size=16)
    exact = rounding_errors(weight, [config])[0]
    found = [rounding_errors(weight, [config], sample=4, seed=seed)[0] for seed in range(30)]
    np.testing.assert_allclose(found, exact, rtol=0.15)
    table = normal_float_table(4)
    cells = (torch.arange(4096) + 0.5) / 2048 - 1
    nearest = table[(cells[:, None] - table).abs().argmin(1)]
    curve = relative_errors(typical_units(weight, 64), nearest)
    units = (weight / weight.abs().amax(1, keepdim=True))[0]
    for ratio in (0.5, 1.0, 1.5):
        expected = (units[:, None] - ratio * table).abs().min(1).values.square().mean()
        assert curve[int(ratio * 64)] == pytest.approx(expected.item(), rel=0.02)
    every = RowSample(rows=torch.arange(40), counts=torch.ones(40, dtype=torch.float64))
    model = BlockModel(
        weight, weight.abs().amax(1, keepdim=True), torch.full((1,), 64.0), {4: nearest}, every, 64
    )
    assert float(model.correction(config, 4)) == pytest.approx(1)


def test_float16_stands_for_bfloat16_where_its_range_reaches() -> None:
    weight = 0.02 * heavy(24, 128)
    twins = finer_twins(weight, MENU)
    assert len(twins) == 144
    for at, twin in twins.items():
        one, other = MENU[at].to_dict(), MENU[twin].to_dict()
        assert (one.pop("scale_dtype"), other.pop("scale_dtype")) == ("bfloat16", "float16")
        assert one == other
    assert finer_twins(1e-8 * weight, MENU) == {}
    assert finer_twins(1e9 * weight, MENU) == {}
    assert len(finer_twins(torch.zeros(8, 64), MENU)) == 144
    assert finer_twins(weight, [config for config in MENU if config.scale_dtype != "float16"]) == {}


@given(st.floats(2.0**-17, 65504.0))
def test_the_bound_of_float16_is_the_smaller_one(value: float) -> None:
    number = torch.tensor(value, dtype=torch.float64)
    bound = 2.0 ** (np.floor(np.log2(value)) - 8)  # half a unit in the last place of bfloat16
    assert abs(float(number.half().double() - number)) <= bound
    assert abs(float(number.bfloat16().double() - number)) <= bound * (1 + 1e-12)
