"""The diagonal Fisher information as data: costs, scales and files, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import UsageError
from compress.quantize.fisher import FLOOR, Fisher, load_fisher, save_fisher


def information(
    shape: tuple[int, int], seed: int = 0, *, noise: float = 1.0, skew: float = 1.0, size: float = 1e-6
) -> Tensor:
    """A made-up F: strong and weak rows and columns, times noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape[0], 1, generator=generator)
    columns = torch.randn(shape[1], generator=generator)
    rest = torch.randn(shape, generator=generator)
    return size * (skew * rows + 1.5 * skew * columns + noise * rest).exp()


def weighted(full: Tensor, error: Tensor) -> float:
    return float((full.double() * error.double().square()).sum())


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1e-12, 1e-3, 1e4]),
)
def test_costs_are_weighted_sums_of_squares(shape: tuple[int, int], seed: int, size: float) -> None:
    full = information(shape, seed, size=size)
    error = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    fisher = Fisher.of(full, examples=3)
    assert fisher.cost(error) == pytest.approx(weighted(full, error), rel=1e-5)
    outer = full.double().sum(1, keepdim=True) * full.double().sum(0) / full.double().sum()
    assert fisher.summed().cost(error) == pytest.approx(weighted(outer, error), rel=1e-5)
    assert fisher.summed().full is None
    assert (fisher.shape, fisher.examples) == (shape, 3)


def test_the_sums_of_a_rank_one_matrix_tell_all_of_it() -> None:
    full = information((20, 30), noise=0.0)
    error = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    fisher = Fisher.of(full, examples=1)
    assert fisher.summed().cost(error) == pytest.approx(fisher.cost(error), rel=1e-5)


def test_uniform_information_is_the_frobenius_norm() -> None:
    error = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    fisher = Fisher.uniform((24, 40))
    assert fisher.cost(error) == pytest.approx(float(error.double().square().sum()), rel=1e-6)
    assert torch.equal(fisher.scale_rows(), torch.ones(24))
    assert torch.equal(fisher.scale_columns(), torch.ones(40))


def test_scales_are_roots_of_means_up_to_a_factor() -> None:
    full = information((20, 30))
    fisher = Fisher.of(full, examples=1)
    for found, axis in ((fisher.scale_rows(), 1), (fisher.scale_columns(), 0)):
        expected = full.double().mean(axis).sqrt()
        torch.testing.assert_close(found.double(), expected / expected.mean(), rtol=1e-5, atol=0)


def test_what_never_had_a_gradient_is_floored_and_costs_nothing() -> None:
    full = information((6, 8), skew=0.0)
    full[2], full[:, 5] = 0, 0
    fisher = Fisher.of(full, examples=1)
    assert float(fisher.scale_rows()[2]) == pytest.approx(FLOOR)
    assert float(fisher.scale_columns()[5]) == pytest.approx(FLOOR)
    error = torch.zeros(6, 8)
    error[2], error[:, 5] = 1, 1
    assert fisher.cost(error) == fisher.summed().cost(error) == 0.0
    nothing = Fisher.of(torch.zeros(6, 8), examples=1)
    assert torch.equal(nothing.scale_rows(), torch.ones(6))
    assert nothing.cost(error) == nothing.summed().cost(error) == 0.0


def test_another_shape_is_refused() -> None:
    fisher = Fisher.of(information((6, 8)), examples=1)
    for one in (fisher, fisher.summed()):
        with pytest.raises(UsageError, match=r"6 x 8 cannot weigh one of shape \(8, 6\)"):
            one.cost(torch.zeros(8, 6))


def test_files_hold_what_was_saved(tmp_path: Path) -> None:
    whole = Fisher.of(information((6, 8)), examples=5)
    found = {"layers.0.q": whole, "layers.0.down": Fisher.of(information((4, 9)), examples=6).summed()}
    save_fisher(tmp_path / "0.safetensors", found)
    read = load_fisher(tmp_path / "0.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]
    assert set(read) == set(found)
    for name, fisher in found.items():
        assert read[name].examples == fisher.examples
        for part in ("rows", "columns"):
            assert torch.equal(getattr(read[name], part), getattr(fisher, part))
    assert whole.full is not None
    kept = read["layers.0.q"].full
    assert kept is not None
    assert torch.equal(kept, whole.full)
    assert read["layers.0.down"].full is None
    save_fisher(tmp_path / "1.safetensors", {})  # a layer that has lost both branches
    assert load_fisher(tmp_path / "1.safetensors") == {}
