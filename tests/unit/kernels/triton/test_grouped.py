"""A group's results are those of each matrix by itself, bit for bit."""

from __future__ import annotations

import pytest
import torch

from compress.errors import UsageError
from compress.kernels.triton.choice import Tiles
from compress.kernels.triton.launch import runs_on
from tests.unit.kernels.native import random_case, random_input

from .cases import DEVICE, needs_kernels, placed

if runs_on(DEVICE):
    from compress.kernels.triton.grouped import group_product, groupable
    from compress.kernels.triton.product import product

pytestmark = needs_kernels


@pytest.mark.parametrize(("rows", "ranks", "splits"), [((70, 20, 5), (3, 0, 17), 2), ((20, 40), (0, 0), 1)])
def test_members_get_what_they_get_alone(rows: tuple[int, ...], ranks: tuple[int, ...], splits: int) -> None:
    matrices = [placed(random_case(count, 150, bits=3, block_size=24, seed=count).matrix) for count in rows]
    factors = [
        (random_input(rank, count, seed=2).to(DEVICE), random_input(rank, 150, seed=3).to(DEVICE))
        if rank
        else None
        for count, rank in zip(rows, ranks, strict=True)
    ]
    x, tiles = random_input(3, 150).to(DEVICE), Tiles(rows=64, chunks=4, splits=splits)
    found = group_product(x, matrices, factors, tiles)
    for (y, inner), matrix, own in zip(found, matrices, factors, strict=True):
        alone, sums = product(x, matrix, own, choice=tiles)
        # one share is added to nothing, which changes no bit either
        assert torch.equal(y, alone)
        assert torch.equal(inner, sums)


def test_what_makes_no_group_is_refused() -> None:
    four, three = (placed(random_case(20, 64, bits=bits).matrix) for bits in (4, 3))
    assert not groupable([four, three])
    assert not groupable([four])
    assert groupable([four, four])
    x = random_input(1, 64).to(DEVICE)
    with pytest.raises(UsageError, match="do not make a group"):
        group_product(x, [four, three], [None, None], Tiles())
    with pytest.raises(UsageError, match="do not make a group"):
        group_product(x, [four, four], [None], Tiles())
