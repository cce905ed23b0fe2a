"""The menu, exact storage sizes and validation of quantization configurations."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UsageError
from compress.quantize.config import MENU, QuantConfig


def test_the_menu_has_432_entries_and_184_bit_rates() -> None:
    assert (len(MENU), len(set(MENU)), len({c.nominal_bits for c in MENU})) == (432, 432, 184)


def test_nominal_bits_of_the_paper() -> None:
    assert QuantConfig(bits=4).nominal_bits == pytest.approx(4.127, abs=5e-4)
    assert QuantConfig(bits=3).nominal_bits == pytest.approx(3.127, abs=5e-4)


def test_stored_bits_of_an_aligned_matrix_are_the_nominal_ones_and_one_offset() -> None:
    shape = (512, 512)
    for config in MENU:
        assert config.storage_bits(shape) == config.nominal_bits * math.prod(shape) + 32


@given(st.sampled_from(MENU), st.integers(1, 100), st.integers(1, 300))
def test_stored_bits_count_padding_and_short_groups(config: QuantConfig, rows: int, columns: int) -> None:
    def to_bytes(bits: int) -> int:
        return 8 * math.ceil(bits / 8)

    def codes(count: int, width: int) -> int:
        return to_bytes(2 * count) + to_bytes(count) if width == 3 else to_bytes(width * count)

    blocks = rows * math.ceil(columns / config.block_size)
    wide = {"float32": 32, "float16": 16, "bfloat16": 16}[config.scale_dtype]
    expected = codes(blocks * config.block_size, config.bits) + codes(blocks, config.scale_bits)
    expected += wide * math.ceil(blocks / config.group_size) + 32
    assert config.storage_bits((rows, columns)) == expected
    assert config.bits_per_weight((rows, columns)) == expected / (rows * columns)


def test_configurations_survive_json() -> None:
    for config in MENU[::17]:
        assert QuantConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "values",
    [
        {"bits": 5},
        {"bits": 4, "scale_bits": 6},
        {"bits": 4, "scale_dtype": "float64"},
        {"bits": 4, "block_size": 12},
        {"bits": 4, "block_size": 0},
        {"bits": 4, "group_size": 0},
        {"bits": 4, "wat": 1},
        {"scale_bits": 8},
    ],
)
def test_what_is_not_possible_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        QuantConfig.from_dict(values)
