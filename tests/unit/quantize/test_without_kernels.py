"""What serves on a GPU and without a C compiler: the same results from torch alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.importance.lora import lora_group_sums
from compress.importance.modules import WeightRows
from compress.quantize.blockwise import quantize_blockwise, quantize_dequantize
from compress.quantize.config import MENU, QuantConfig
from compress.quantize.hessian import InputStatistics, input_statistics
from compress.quantize.output_aware import decompose_outputs
from compress.quantize.rank_ratios import mean_shares
from compress.quantize.rounding import fitted_table
from compress.quantize.rounding_errors import rounding_errors

ASKS = {
    "compress.importance.lora": "serves_blocks",
    "compress.quantize.blockwise": "serves_blocks",
    "compress.quantize.codebook": "serves",
    "compress.quantize.descent": "serves",
    "compress.quantize.rounding": "serves",
    "compress.quantize.rounding_errors": "serves_blocks",
}
"""Module -> what it asks whether a kernel is there."""
LEARNED = QuantConfig(bits=3, scale_bits=4, block_size=16, group_size=64, codebook="learned")


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Call it a machine without the C library; ``undo`` brings that back."""
    for module, question in ASKS.items():
        monkeypatch.setattr(f"{module}.{question}", lambda *tensors: False)
    return monkeypatch


def case(rows: int = 40, columns: int = 90) -> tuple[Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = mix @ torch.randn(columns, 4 * columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator), input_statistics(inputs @ inputs.T)


def test_plain_rounding_gives_the_same_bits(torch_alone: pytest.MonkeyPatch) -> None:
    weight, _ = case()
    configs = [QuantConfig(bits=bits, block_size=24, group_size=7) for bits in (2, 3, 4, 8)]
    slow = [(quantize_blockwise(weight, c).tensors(), quantize_dequantize(weight, c)) for c in configs]
    torch_alone.undo()
    for config, (tensors, values) in zip(configs, slow, strict=True):
        found = quantize_blockwise(weight, config).tensors()
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in found)
        assert torch.equal(quantize_dequantize(weight, config), values)


@pytest.mark.parametrize("weighed", [False, True])
def test_errors_of_a_menu_agree(torch_alone: pytest.MonkeyPatch, weighed: bool) -> None:
    weight, _ = case()
    weights = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) if weighed else None
    configs = [*MENU[::37], MENU[0], MENU[0]]  # one that is there twice has its error twice
    slow = rounding_errors(weight, configs, element_weights=weights)
    means = mean_shares(weight, configs)
    torch_alone.undo()
    np.testing.assert_allclose(rounding_errors(weight, configs, element_weights=weights), slow, rtol=1e-4)
    np.testing.assert_allclose(mean_shares(weight, configs), means, rtol=1e-4, atol=1e-6)


def test_tables_and_rounding_for_the_outputs_agree(torch_alone: pytest.MonkeyPatch) -> None:
    weight, statistics = case()
    table = fitted_table(weight, LEARNED, statistics.weights).table
    slow = [decompose_outputs(weight, LEARNED, statistics, rank=rank).output_error for rank in (0, 4)]
    torch_alone.undo()
    torch.testing.assert_close(
        fitted_table(weight, LEARNED, statistics.weights).table, table, rtol=1e-4, atol=1e-5
    )
    fast = [decompose_outputs(weight, LEARNED, statistics, rank=rank).output_error for rank in (0, 4)]
    assert fast == pytest.approx(slow, rel=0.02)


@pytest.mark.parametrize("over", ["rows", "columns"])
@pytest.mark.parametrize("element", ["square", "abs"])
def test_importance_agrees(torch_alone: pytest.MonkeyPatch, over: str, element: str) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, a, grad_a = (torch.randn(size, 70, generator=generator) for size in (50, 4, 4))
    b, grad_b = (torch.randn(50, 4, generator=generator) for _ in range(2))

    def sums() -> Tensor:
        rows = WeightRows.of(weight)
        return lora_group_sums(
            rows, a, b, grad_a, grad_b, scaling=2.0, over=over, element=element, chunk_elements=700
        )

    slow = sums()
    torch_alone.undo()
    torch.testing.assert_close(sums(), slow, rtol=1e-4, atol=1e-6 * float(slow.max()))
