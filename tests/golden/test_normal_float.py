"""The NF tables of METHODS §3.2: printed values, QLoRA's published table, and the definition recomputed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from compress.errors import UsageError
from compress.quantize.normal_float import normal_float_table

PRINTED = {
    2: [-1, 0, 0.3379, 1],
    3: [-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1],
}
QLORA_NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


@pytest.mark.parametrize("bits", [2, 3])
def test_small_tables_equal_the_printed_ones(bits: int) -> None:
    assert normal_float_table(bits).tolist() == pytest.approx(PRINTED[bits], abs=6e-5)


def test_nf4_is_the_table_of_qlora() -> None:
    assert normal_float_table(4).tolist() == pytest.approx(QLORA_NF4, abs=2e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tables_follow_the_definition(bits: int) -> None:
    delta = (1 / 30 + 1 / 32) / 2
    lower = norm.ppf(np.linspace(delta, 0.5, 2 ** (bits - 1)))
    upper = norm.ppf(np.linspace(0.5, 1 - delta, 2 ** (bits - 1) + 1))
    expected = np.concatenate([lower[:-1], upper]) / upper[-1]
    table = normal_float_table(bits)
    assert table.shape == (2**bits,)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=6e-8)
    assert (table[0].item(), table[2 ** (bits - 1) - 1].item(), table[-1].item()) == (-1.0, 0.0, 1.0)


def test_another_width_is_refused() -> None:
    with pytest.raises(UsageError, match="5-bit"):
        normal_float_table(5)
