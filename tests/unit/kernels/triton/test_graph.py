"""Products can be captured in a CUDA graph: nothing waits for the device, and all memory is torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compress.kernels.triton.choice import Choice, Slices, Tiles
from compress.kernels.triton.launch import runs_on
from tests.unit.kernels.native import random_case, random_input

from .cases import DEVICE, needs_kernels, placed

if runs_on(DEVICE):
    from compress.kernels.triton.grouped import group_product
    from compress.kernels.triton.product import product, product_transposed
    from compress.kernels.triton.rows import picked_rows

pytestmark = needs_kernels

WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "is_nonzero", "masked_select", "equal"}
"""Operations whose results the host must see, or whose sizes depend on values."""
CHOICES = (Tiles(rows=64, chunks=2, splits=2), Slices(nbytes=1 << 14))


class Seen(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def calls(choice: Choice) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """A product with factors and its gradient, from an input [2, 64]; the matrix is square."""
    matrix = placed(random_case(64, 64, bits=4, block_size=32).matrix)
    factors = (random_input(4, 64, seed=2).to(DEVICE), random_input(4, 64, seed=3).to(DEVICE))
    return [
        lambda x: product(x, matrix, factors, choice=choice)[0],
        lambda x: product_transposed(x, matrix, factors, choice=choice),
    ]


@pytest.mark.parametrize("choice", CHOICES, ids=("tiles", "slices"))
def test_nothing_waits_for_the_device(choice: Choice) -> None:
    x = random_input(2, 64).to(DEVICE)
    with Seen() as seen:
        for call in calls(choice):
            call(x)
        matrix = placed(random_case(20, 64, bits=4, block_size=32).matrix)
        picked_rows(matrix, torch.tensor([3, 5], device=DEVICE))
        group_product(x, [matrix, matrix], [None, None], Tiles(rows=32, chunks=2))
    assert {"empty", "new_empty"} & seen.names  # it does see
    assert seen.names & WAITING == set()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no CUDA device")
@pytest.mark.parametrize("choice", CHOICES, ids=("tiles", "slices"))
def test_a_graph_gives_what_the_calls_give(choice: Choice) -> None:
    x, other = random_input(2, 64).to(DEVICE), random_input(2, 64, seed=9).to(DEVICE)
    for call in calls(choice):
        expected = [call(x).clone(), call(other).clone()]  # compiled before anything is captured
        held, graph = x.clone(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = call(held)
        for given, result in zip((x, other), expected, strict=True):
            held.copy_(given)
            graph.replay()
            assert torch.equal(found, result)
